"""Sums of a loss and of what an objective measures beside it, over micro batches, then ranks, then steps.

What is shown is a sum over a count; so it is the same for every accumulation and any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from hpcft.train.protocols import Loss

Sums = dict[str, list[float]]  # name → [total, count]


class Totals:
    """Of this rank. Nothing waits for the device before what ``asked`` gave is called."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.units = 0
        self._totals: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, loss: Loss, units: int) -> None:
        """One micro batch."""
        self.loss = self.loss + loss.value.detach().double()
        self.units += units
        for name, (total, count) in loss.metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + total.detach().double()
            self._counts[name] = self._counts.get(name, 0) + count

    def asked(self, *more: torch.Tensor) -> Callable[[], tuple[float, list[float], list[float]]]:
        """Ask the device for the loss, every metric's total and count in one row, and ``more``.

        What is given back waits for them alone, not for what was queued after the question.
        """
        answer = on_host(torch.stack([self.loss, *self._totals.values(), *(m.double() for m in more)]))

        def read() -> tuple[float, list[float], list[float]]:
            loss, *rest = answer()
            own, others = rest[: len(self._totals)], rest[len(self._totals) :]
            return loss, [n for pair in zip(own, self._counts.values(), strict=True) for n in pair], others

        return read

    def read(self) -> tuple[float, list[float], list[float]]:
        """Ask, and wait for the answer."""
        return self.asked()()

    def named(self, row: Sequence[float]) -> Sums:
        """The metrics of a row of ``read``, or of a sum of such rows, by name."""
        return {name: [row[2 * i], row[2 * i + 1]] for i, name in enumerate(self._totals)}


def on_host(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers to the host; what is given back waits for that copy."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def add(sums: Sums, more: Mapping[str, Sequence[float]]) -> None:
    """``sums`` grows by ``more``."""
    for name, (total, count) in more.items():
        before = sums.get(name, [0.0, 0.0])
        sums[name] = [before[0] + total, before[1] + count]


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What is shown. Of rewards also how far the two kinds of answers are apart."""
    shown = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
    if "rewards/chosen" in shown:
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    return shown
