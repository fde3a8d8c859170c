"""The state of a step on the host: what a save stops the ranks for. Everything after it runs beside the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from hpcft.run.manifest import PARTS
from hpcft.run.regions import Region
from hpcft.train.progress import Progress
from hpcft.train.protocols import Sharded

T = TypeVar("T")
SLAB = 2**29  # float32 numbers: 2 GiB, a power of two, to which torch rounds what it locks
ALIGNED = 128  # numbers


@dataclass(frozen=True)
class Held:
    """One piece of one tensor, as this rank has it. shape: of the whole tensor; key: of the numbers in ``tensors``."""

    name: str
    part: str
    shape: tuple[int, ...]
    offset: int
    length: int
    region: Region | None

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Snapshot:
    """step: it was taken after; best: the best evaluation is of it; progress, state: as the manifest has them."""

    step: int
    best: bool
    progress: Mapping[str, Any]
    state: Mapping[str, Any]
    held: tuple[Held, ...]
    tensors: Mapping[str, torch.Tensor]


class Host:
    """Memory of the node for one snapshot at a time, taken once and used again: locking its pages takes long.

    What is copied to from a GPU is taken in slabs: each call of the driver waits for the device, and a model has
    thousands of tensors.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def wanted(self, sharded: Sharded) -> list[tuple[str, int, bool]]:
        """Key, numbers and "is on a GPU" of every buffer that a snapshot of ``sharded`` will be copied into."""
        return [(f"{s.part}/{s.name}", s.tensor.numel(), s.tensor.is_cuda) for s in sharded.shards()]

    def reserve(self, wanted: list[tuple[str, int, bool]]) -> None:
        """Take the memory before it is needed; may run in a thread."""
        self._buffers = {
            key: torch.empty(numbers, dtype=torch.float32) for key, numbers, on_device in wanted if not on_device
        }
        rooms = [(key, numbers, _aligned(numbers)) for key, numbers, on_device in wanted if on_device]
        for slab in bundles(rooms, lambda room: room[2], SLAB):
            sizes = [size for _, _, size in slab]
            locked = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=True).split(sizes)
            self._buffers |= {key: part[:numbers] for (key, numbers, _), part in zip(slab, locked, strict=True)}

    @torch.no_grad()
    def take(self, sharded: Sharded, progress: Progress) -> Snapshot:
        """Copy this rank's part of masters and moments; waits for the device once, at the end."""
        wanted = self.wanted(sharded)
        if {key: numbers for key, numbers, _ in wanted} != {key: len(kept) for key, kept in self._buffers.items()}:
            self.reserve(wanted)
        held, tensors, on_device = [], {}, False
        for shard in sharded.shards():
            assert shard.part in PARTS
            piece = Held(shard.name, shard.part, shard.shape, shard.offset, shard.tensor.numel(), shard.region)
            on_device = on_device or shard.tensor.is_cuda
            # float32 on the device already: a copy that converts on its way to the host waits for each tensor.
            numbers = shard.tensor.detach().to(torch.float32)
            tensors[piece.key] = self._buffers[piece.key].copy_(numbers, non_blocking=True)
            held.append(piece)
        if on_device:
            torch.cuda.synchronize()
        scale = sharded.scale
        state = {"updates": sharded.updates, "loss_scale": scale.value, "good_steps": scale.good_steps}
        best = progress.best_step == progress.step
        return Snapshot(progress.step, best, progress.to_json(), state, tuple(held), tensors)


def bundles(items: Iterable[T], numbers: Callable[[T], int], most: int) -> list[list[T]]:
    """The items in order, ``most`` numbers of them together, or one that has more."""
    made: list[list[T]] = []
    room = 0
    for item in items:
        size = numbers(item)
        if not made or size > room:
            made.append([])
            room = most
        made[-1].append(item)
        room -= size
    return made


def _aligned(numbers: int) -> int:
    """Room for them, so that the next begins at a multiple of ALIGNED."""
    return -(-numbers // ALIGNED) * ALIGNED
