"""Slurm's words for a duration, read and written in minutes. Standard library only: both sides of the queue use it."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


def minutes(text: str) -> int | None:
    """Whole minutes, rounded up: ``30`` (minutes), ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM``, ``D-HH:MM:SS``.

    None for everything that is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, mins, secs = [*parts, 0, 0][:3]
        hours += 24 * int(match["days"])
    else:
        hours, mins, secs = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return hours * 60 + mins + (secs > 0)


def clock(total: int) -> str:
    """Minutes as Slurm writes them: 90 is 01:30:00, 2880 is 2-00:00:00."""
    days, rest = divmod(total, 24 * 60)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"
