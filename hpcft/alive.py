"""Is a process still the one that somebody wrote down? Numbers of processes come again, the moments of start do not.

Standard library only: who holds a run, and who prepares data, is looked up with it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def born(pid: int) -> str:
    """When a process of this host was started, in clock ticks since boot; "" where there is none, or it has ended."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
