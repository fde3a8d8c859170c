"""Where the time of a start went: seconds of each phase, in the ledger as they pass, so that a start that hangs says
where. ``hpcft status`` shows rank 0's."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from hpcft.run.ledger import Ledger


class Timeline:
    """One rank's phases, from the start of its process on; the first, ``python``, is over when this is made."""

    def __init__(self, ledger: Ledger, rank: int) -> None:
        self.ledger, self.rank, self.phases = ledger, rank, dict[str, float]()
        self._since = time.perf_counter() - age()
        self("python")

    def __call__(self, name: str, seconds: float | None = None) -> None:
        """The phase ``name`` is over. seconds: it took these of the time since the last one, which goes on."""
        now = time.perf_counter()
        took = now - self._since if seconds is None else seconds
        self._since += took
        self.phases[name] = round(took, 3)
        self.ledger.write("phase", rank=self.rank, name=name, seconds=self.phases[name])


def age() -> float:
    """Seconds since this process was started, to a hundredth; 0.0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0
