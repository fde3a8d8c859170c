"""Which windows an optimizer step consumes: a pure function of (seed, epoch, position), never of the ranks.

An epoch is a permutation of all windows. A step takes the next ``global_windows`` of it, the last step of an epoch
what is left. So one integer, the windows consumed so far, says where a run stands, on any number of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hpcft.errors import refuse


@dataclass(frozen=True)
class Share:
    """Some consecutive windows of one step, forwarded together. position: of the first one within the step."""

    position: int
    windows: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """The global order of ``windows`` windows, ``global_windows`` per optimizer step."""

    windows: int
    global_windows: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise refuse("the prepared data has no window to train on", hint="look at it with: hpcft inspect")

    def step(self, consumed: int) -> tuple[int, ...]:
        """The windows of the step that begins after ``consumed`` windows."""
        epoch, offset = divmod(consumed, self.windows)
        order = permutation(self.windows, self.seed, epoch)
        return tuple(int(i) for i in order[offset : offset + self.global_windows])

    def steps(self, consumed: int) -> Iterator[tuple[int, ...]]:
        """The windows of every step from there on, without end."""
        while True:
            step = self.step(consumed)
            yield step
            consumed += len(step)

    def ends_epoch(self, consumed: int) -> bool:
        """Has a whole number of epochs been consumed?"""
        return consumed % self.windows == 0


def shares(windows: tuple[int, ...], per_forward: int, rank: int, ranks: int) -> Iterator[Share]:
    """The part of reader ``rank`` in a step: every ``ranks``-th chunk of ``per_forward`` windows; perhaps none."""
    for position in range(rank * per_forward, len(windows), ranks * per_forward):
        yield Share(position, windows[position : position + per_forward])


@lru_cache(maxsize=2)
def permutation(windows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [windows]: the order of an epoch.

    Sorted raw PCG64 words: numpy promises those streams for ever, but not those of Generator.permutation, and an
    update of numpy between two attempts must not change the order.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(windows)
    return np.argsort(words, kind="stable")


def forward_seed(seed: int, step: int, position: int) -> int:
    """The seed of the random generators for the forward pass of the share at ``position`` of ``step``.

    Dropout is so a function of where a run stands, not of how it came there.
    """
    return int(np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)[0] >> 1)
