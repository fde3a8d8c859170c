"""What strategies and objectives share with the loop: the whole vocabulary of ``train/`` on one page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from hpcft.data.kinds import Kind
from hpcft.plan.plan import Plan
from hpcft.run.regions import Region
from hpcft.train.precision import LossScale
from hpcft.train.skeleton import Skeleton
from hpcft.train.world import World

CHAT, CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE, LABELLED = Kind


class Window(Protocol):
    """What the shards hold: tokens int32 [n], trained bool [n], lengths of the documents, summing to n.

    kinds and margins: one for each document; a chosen document is followed by its rejected one, and the margin of a
    labelled one is the number of its class.
    """

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...

    @property
    def documents(self) -> Sequence[int]: ...

    @property
    def kinds(self) -> Sequence[int]: ...

    @property
    def margins(self) -> Sequence[float]: ...


class Windows(Protocol):
    """All windows of one split, memory-mapped."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...

    def trained_tokens(self, index: int) -> int:
        """Trained tokens of one window, without reading its tokens."""

    def count(self, index: int, kinds: Collection[int]) -> int:
        """Documents of these kinds in one window, without reading its tokens."""


@dataclass
class Batch:
    """One micro batch of windows on this rank's device.

    tokens, positions: int64 [rows, length]. labels: int64 [rows, length], already shifted (labels[t] is the
    token after tokens[t]), -100 where nothing is trained. Positions restart at 0 with every packed document.
    lengths: documents' lengths, row by row, summing to the length of the row (padding is a document of its own),
    for kernels that want cumulative sequence lengths. trained: int64 [n], the flat indices (row × length + column)
    whose label is trained; n is known on the host, so counting never waits for the device.
    windows: which windows of the run these are, for messages.

    documents: int64 [rows, length], the document that a token belongs to, counted through the micro batch; -1 in the
    padding. kinds, margins: of each. reference: the log-probability of its trained tokens before training, where that
    was computed beforehand. others: for rated answers, each prompt with another's answer, as a batch of its own.
    few_shapes: shapes are those of other batches wherever they can be, for programs that are compiled for each.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[list[int]]
    packed: bool
    trained: torch.Tensor
    windows: tuple[int, ...] = ()
    documents: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kinds: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    reference: tuple[float, ...] | None = None
    others: Batch | None = None
    few_shapes: bool = False


class Mean(NamedTuple):
    """A metric of a micro batch: a sum, and of how many. Both are added up over micro batches, ranks and steps."""

    total: torch.Tensor
    number: int


@dataclass
class Loss:
    """value: scalar sum over this micro batch, to be divided by the global count.

    metrics: the same names for every micro batch of an objective, also for one that has nothing to count.
    """

    value: torch.Tensor
    metrics: Mapping[str, Mean] = field(default_factory=dict)


class Objective(Protocol):
    """What a module of ``objectives/`` builds: what a micro batch costs and what it counts."""

    def units(self, windows: Windows, index: int) -> int:
        """How many units (trained tokens for sft, pairs for dpo) window ``index`` counts, without building it.

        So every rank knows the divisor of the whole global batch before its first forward pass, without a message.
        """

    def count(self, batch: Batch) -> int:
        """The units of this micro batch: the sum of ``units`` over its windows."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """What ``loss`` must know of the whole global batch: this rank's part of sums over it; [] for nothing.

        Before a step's first loss, over its micro batches on this rank; in an evaluation, over all of its batches.
        """

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """The summed loss of this micro batch; the loop divides it by the count over the whole global batch.

        known: what ``ahead`` gave, summed over the ranks.
        """


@dataclass(frozen=True)
class Shard:
    """One piece of one named tensor of the global state, held by this rank.

    name: the parameter's name in the plain transformers or peft model. part: master, exp_avg or exp_avg_sq.
    shape: of the global tensor. offset and tensor's length: the piece as a range of its flattened numbers, or of
    those of ``region`` where tensor parallelism has cut it.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    offset: int
    tensor: torch.Tensor  # one dimension, float32 or where masters are bfloat16 that, on CPU or device
    region: Region | None = None


class Sharded(Protocol):
    """A model made trainable by a strategy; the loop knows nothing else of parallelism.

    skeleton: names and shapes of the whole parameters, whatever this rank holds of them.
    scale: the loss scale (1 except in float16); backward multiplies by it and the gradients come out divided.
    updates: AdamW steps done, which its bias correction depends on; fewer than optimizer steps where some were skipped.
    """

    model: nn.Module
    skeleton: Skeleton
    scale: LossScale
    updates: int

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients of ``loss``, already divided by the global count (summed over ranks, never averaged).

        last: this is the last micro batch of the optimizer step on this rank; gradients are reduced during it.
        """

    def reduce(self) -> None:
        """Finish the reduction; a rank that had no window in this step calls it too."""

    def norm(self) -> torch.Tensor:
        """The 2-norm of all gradients of all ranks: a float32 scalar on the device, for which nothing waits."""

    def step(self, learning_rate: float, divisor: torch.Tensor, good: torch.Tensor) -> None:
        """Queue one AdamW step on the masters, with the gradients over ``divisor``; the host does not wait for it.

        divisor, good: float32 scalars on the device, the same on all ranks; where ``good`` is 0, nothing changes.
        """

    def end_step(self, good: bool) -> None:
        """What ``good`` was, now that the host knows it; the gradients are empty afterwards."""

    def shards(self) -> Iterator[Shard]:
        """This rank's part of masters and moments, every element of the global state on exactly one rank."""

    def load(self, read: ReadShard, updates: int) -> None:
        """Fill masters and moments from the global form, whatever layout wrote it, after ``updates`` AdamW steps."""


class ReadShard(Protocol):
    """Reads a flat float32 range of a named part, or of a region of it, from a checkpoint: a CPU tensor."""

    def __call__(
        self, name: str, part: str, offset: int, length: int, region: Region | None = None
    ) -> torch.Tensor: ...


class Strategy(Protocol):
    """A module of ``strategies/``."""

    def build(self, skeleton: Skeleton, plan: Plan, world: World) -> Sharded:
        """Spread a model over the ranks of ``world``: read what this rank keeps of it, and give it its optimizer."""
