"""Is a process still the one that somebody wrote down? Numbers of processes come again, the moments of start do not.

Standard library only: who holds a run, and who prepares data, is looked up with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def born(pid: int) -> str:
    """When a process of this host was started, in clock ticks since boot; "" where there is none, or it has ended."""
    fields = _facts(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def gone(pid: int, then: str) -> bool:
    """Whether the process of this host that was ``born`` then has ended; then "": whether no process has its number.

    A system may hide all of another account's process but that there is one of its number (hidepid of /proc).
    """
    fields = _facts(pid)
    if then and fields:
        return fields[0] in "ZX" or fields[19] != then
    try:
        os.kill(pid, 0)
    except OSError as error:  # another account's may not be signalled
        return isinstance(error, ProcessLookupError)
    return False


def descends(pid: int, other: int) -> bool:
    """Whether a process is ``other``, or was started by it or by one that was."""
    while pid > 1 and pid != other:
        fields = _facts(pid)
        pid = int(fields[1]) if fields else 0
    return pid == other


def _facts(pid: int) -> list[str]:
    """What the system says of a process, from its state on; [] where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []
