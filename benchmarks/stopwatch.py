"""Steps timed alike for every contestant: the device is waited for at the ends of the window and nowhere inside."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.device import Clocks
from benchmarks.ranks import STARTED

FEWEST_WARM, FEWEST_TIMED = 3, 5


def since_start() -> float:
    """Seconds since the ranks were started, imports and all."""
    return time.time() - float(os.environ.get(STARTED, time.time()))


@dataclass(frozen=True)
class Limits:
    """warmup, steps: wanted; seconds: of the timed window, and at most as long of warm-up: a slow contestant is timed
    over fewer steps, never fewer than FEWEST_TIMED."""

    warmup: int = 10
    steps: int = 20
    seconds: float = 60.0


@dataclass
class Stopwatch:
    """Told of the end of every optimizer step, on every rank. device: "cuda" or "cpu"."""

    limits: Limits
    device: str
    first: bool  # the rank that looks at the clocks of the GPUs
    number: int = 0
    warm: int = FEWEST_WARM
    timed: int = FEWEST_TIMED
    first_step: float = 0.0  # seconds from the start of the process to the end of the first step
    wall: float = 0.0
    _marks: list[Any] = field(default_factory=list)
    _at: float = 0.0
    _began: float = 0.0
    _clocks: Clocks | None = None
    seen: dict[str, float] = field(default_factory=dict)

    def ended(self) -> bool:
        """One more optimizer step has been asked of the device. True when the window is over, on all ranks alike."""
        self.number += 1
        if self.number == 1:
            self._wait()
            self.first_step = self._agreed(since_start())
            self._at = time.perf_counter()
        elif self.number == 2:
            self._wait()
            self.warm = self._fitting(time.perf_counter() - self._at, self.limits.warmup, FEWEST_WARM)
            self._at = time.perf_counter()
        elif self.number == self.warm:
            self._wait()
            step = (time.perf_counter() - self._at) / max(1, self.number - 2)
            self.timed = self._fitting(step, self.limits.steps, FEWEST_TIMED)
            self._begin()
        elif self.number > self.warm:
            self._mark()
        if self.number < self.warm + self.timed or self.number <= self.warm:
            return False
        self._wait()
        self.wall = self._agreed(time.perf_counter() - self._began)
        self.seen = self._clocks.ended() if self._clocks else {}
        return True

    def seconds(self) -> list[float]:
        """Of each timed step."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]

    def facts(self) -> dict[str, Any]:
        """What a row is made of; memory of the fullest rank. Called by all ranks."""
        import torch

        cuda = self.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        reserved = torch.cuda.max_memory_reserved() if cuda else 0
        return {
            "seconds": self.seconds(), "wall": self.wall, "warmup": self.warm, "timed": self.timed,
            "first_step": self.first_step, "peak": self._agreed(peak), "reserved": self._agreed(reserved), **self.seen,
        }  # fmt: skip

    def _begin(self) -> None:
        self._clocks = Clocks() if self.first and self.device == "cuda" else None
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()  # loading may have taken more than training does
        self._began = time.perf_counter()
        self._mark()

    def _mark(self) -> None:
        if self.device != "cuda":
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _fitting(self, step: float, wanted: int, fewest: int) -> int:
        return int(max(fewest, min(wanted, self.limits.seconds // max(self._agreed(step), 1e-9))))

    def _wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _agreed(self, number: float) -> float:
        """The largest of all ranks."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return float(number)
        most = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)
