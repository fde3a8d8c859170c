"""Is a process still the one that somebody wrote down? Numbers of processes come again, the moments of start do not.

Standard library only: who holds a run, and who prepares data, is looked up with it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def born(pid: int) -> str:
    """When a process of this host was started, in clock ticks since boot; "" where there is none, or it has ended."""
    fields = _facts(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def descends(pid: int, other: int) -> bool:
    """Whether a process is ``other``, or was started by it or by one that was."""
    while pid > 1 and pid != other:
        fields = _facts(pid)
        pid = int(fields[1]) if fields else 0
    return pid == other


def _facts(pid: int) -> list[str]:
    """What the system says of a process, from its state on; [] where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
