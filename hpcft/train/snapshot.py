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

    @torch.no_grad()
    def take(self, sharded: Sharded, progress: Progress) -> Snapshot:
        """Copy this rank's part of masters and moments; waits for the device once, at the end."""
        held, tensors, on_device = [], {}, False
        for shard in sharded.shards():
            assert shard.part in PARTS
            piece = Held(shard.name, shard.part, shard.shape, shard.offset, shard.tensor.numel(), shard.region)
            on_device = on_device or shard.tensor.is_cuda
            tensors[piece.key] = self._buffer(piece.key, shard.tensor).copy_(shard.tensor.detach(), non_blocking=True)
            held.append(piece)
        if on_device:
            torch.cuda.synchronize()
        scale = sharded.scale
        state = {"updates": sharded.updates, "loss_scale": scale.value, "good_steps": scale.good_steps}
        best = progress.best_step == progress.step
        return Snapshot(progress.step, best, progress.to_json(), state, tuple(held), tensors)

    def _buffer(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if (known := self._buffers.get(key)) is None or known.numel() != tensor.numel():
            known = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._buffers[key] = known
        return known
