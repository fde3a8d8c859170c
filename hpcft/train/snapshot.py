"""The state of a step on the host: what a save stops the ranks for. Everything after it runs beside the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcft.run.manifest import PARTS
from hpcft.run.regions import Region
from hpcft.train.progress import Progress
from hpcft.train.protocols import Sharded


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
    """Memory of the node for one snapshot at a time, taken once and used again: locking its pages takes long."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def wanted(self, sharded: Sharded) -> list[tuple[str, int, bool]]:
        """Key, numbers and "is on a GPU" of every buffer that a snapshot of ``sharded`` will be copied into."""
        return [(f"{s.part}/{s.name}", s.tensor.numel(), s.tensor.is_cuda) for s in sharded.shards()]

    def reserve(self, wanted: list[tuple[str, int, bool]]) -> None:
        """Take the memory before it is needed; may run in a thread."""
        for key, numbers, on_device in wanted:
            self._buffer(key, numbers, on_device)

    @torch.no_grad()
    def take(self, sharded: Sharded, progress: Progress) -> Snapshot:
        """Copy this rank's part of masters and moments; waits for the device once, at the end."""
        held, tensors, on_device = [], {}, False
        for shard in sharded.shards():
            assert shard.part in PARTS
            piece = Held(shard.name, shard.part, shard.shape, shard.offset, shard.tensor.numel(), shard.region)
            on_device = on_device or shard.tensor.is_cuda
            buffer = self._buffer(piece.key, shard.tensor.numel(), shard.tensor.is_cuda)
            tensors[piece.key] = buffer.copy_(shard.tensor.detach(), non_blocking=True)
            held.append(piece)
        if on_device:
            torch.cuda.synchronize()
        scale = sharded.scale
        state = {"updates": sharded.updates, "loss_scale": scale.value, "good_steps": scale.good_steps}
        best = progress.best_step == progress.step
        return Snapshot(progress.step, best, progress.to_json(), state, tuple(held), tensors)

    def _buffer(self, key: str, numbers: int, on_device: bool) -> torch.Tensor:
        if (known := self._buffers.get(key)) is None or known.numel() != numbers:
            known = torch.empty(numbers, dtype=torch.float32, pin_memory=on_device)
            self._buffers[key] = known
        return known
