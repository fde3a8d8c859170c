"""What strategies and objectives share with the loop: the whole vocabulary of ``train/`` on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from hpcft.plan.plan import Plan
from hpcft.train.world import World


@dataclass
class Batch:
    """One micro batch of windows on this rank's device.

    tokens, positions: int64 [rows, length]. labels: int64 [rows, length], already shifted (labels[t] is the
    token after tokens[t]), -100 where nothing is trained. Positions restart at 0 with every packed document.
    lengths: documents' lengths, row by row, for kernels that want cumulative sequence lengths.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[list[int]]
    packed: bool


@dataclass
class Loss:
    """value: scalar sum over this micro batch, to be divided by the global count; metrics: sums to be reduced."""

    value: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A module of ``objectives/``: what a micro batch costs and what it counts."""

    def count(self, batch: Batch) -> int:
        """How many units (trained tokens for sft) the loss of this micro batch is summed over."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The summed loss of this micro batch; the loop divides it by the count over the whole global batch."""


@dataclass(frozen=True)
class Shard:
    """One piece of one named tensor of the global state, held by this rank.

    name: the parameter's name in the plain transformers or peft model. part: master, exp_avg or exp_avg_sq.
    offset and tensor.shape: the piece as a range of the *flattened* global tensor of ``shape``.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    offset: int
    tensor: torch.Tensor  # one dimension, float32, on CPU or device


class Sharded(Protocol):
    """A model made trainable by a strategy; the loop knows nothing else of parallelism."""

    model: nn.Module

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients of ``loss``, already divided by the global count (summed over ranks, never averaged).

        last: this is the last micro batch of the optimizer step on this rank; gradients are reduced during it.
        """

    def reduce(self) -> None:
        """Finish the reduction; a rank that had no window in this step calls it too."""

    def clip(self, max_norm: float) -> torch.Tensor:
        """Global gradient norm as a scalar tensor; gradients are scaled when max_norm > 0 and the norm exceeds it."""

    def step(self, learning_rate: float) -> None:
        """One AdamW step on the fp32 masters; gradients are empty afterwards."""

    def discard(self) -> None:
        """Throw the gradients away without a step."""

    def shards(self) -> Iterator[Shard]:
        """This rank's part of masters and moments, every element of the global state on exactly one rank."""

    def load(self, read: ReadShard) -> None:
        """Fill masters and moments from the global form, whatever layout wrote it."""


class ReadShard(Protocol):
    """Reads a flat float32 range of a named part from a checkpoint: (name, part, offset, length) → CPU tensor."""

    def __call__(self, name: str, part: str, offset: int, length: int) -> torch.Tensor: ...


class Strategy(Protocol):
    """A module of ``strategies/``."""

    def build(self, model: nn.Module, plan: Plan, world: World) -> Sharded:
        """Spread ``model`` over the ranks of ``world`` and give it its optimizer."""
