"""Slurm's words as values: ``Key=value`` lines, times, durations, counts, and the words for "nothing"."""

from __future__ import annotations

import re
from datetime import datetime, timezone

from hpcft import clock

_NOTHING = frozenset(
    {"", "none", "n/a", "unknown", "(null)", "null", "unlimited", "infinite", "not_set", "invalid", "partition_limit"}
)
_PAIR = re.compile(r"(?:^|\s)([A-Z][A-Za-z0-9_:/]*)=(\S*)")


def pairs(line: str) -> dict[str, str]:
    """The ``Key=value`` words of one line. Where a key comes twice the first counts: free text comes last in Slurm."""
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(line):
        found.setdefault(key, value)
    return found


def word(text: str | None) -> str | None:
    """``text``, or None for any of Slurm's ways to say that there is nothing."""
    return None if text is None or text.strip().lower() in _NOTHING else text.strip()


def moment(text: str | None) -> float | None:
    """Seconds since the epoch of a UTC time such as 2026-01-31T12:00:00; None for None, Unknown and N/A."""
    if (given := word(text)) is None:
        return None
    try:
        return datetime.strptime(given, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def minutes(text: str | None) -> int | None:
    """Whole minutes of a limit, rounded up; None for UNLIMITED and everything that is not a duration."""
    return clock.minutes(word(text) or "")


def number(text: str | None) -> int | None:
    """The whole number that ``text`` starts with (``30 sec`` is 30); None where it starts with none."""
    match = re.match(r"\d+", (word(text) or ""))
    return int(match[0]) if match else None
