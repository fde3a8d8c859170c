"""The process group: who this rank is, which device it drives, and the few messages ranks exchange.

Two groups exist. The default one (NCCL on GPUs) carries tensors of the model. ``control`` is always gloo: what
ranks agree on (stop, save, losses) never queues behind a kernel, and a dead peer is noticed at once.
Nothing is pickled: control messages are numbers, or text as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hpcft.errors import refuse
from hpcft.plan.layout import Layout, Place
from hpcft.plan.place import place_from_environment
from hpcft.plan.plan import Plan


@dataclass(frozen=True)
class World:
    """This rank among all. data_rank, data_size: which reader of data it is, of how many.

    control is None in a world of one, where every exchange answers at once.
    """

    place: Place
    layout: Layout
    device: torch.device
    data_rank: int
    data_size: int
    control: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(minutes=30)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.layout.world_size

    @property
    def first(self) -> bool:
        """Is this the rank that writes what is written once?"""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Does this rank count what it read? Of a tensor group, whose ranks read the same, one does."""
        return self.place.coordinates.get("tp", 0) == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks on the layout's axes. Called by all ranks together the first time."""
        axes = self.layout.axes
        shape, names = tuple(axis.degree for axis in axes), tuple(axis.name for axis in axes)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along ``axes`` alone."""
        mesh = self.mesh[axes]
        return mesh.get_group() if len(axes) == 1 else mesh._flatten().get_group()

    def apart(self) -> World:
        """The same ranks with a control group of their own, for messages beside the loop's. Called by all together."""
        if self.control is None:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=self.timeout))

    def exchange(self, row: Sequence[float]) -> list[list[float]]:
        """Every rank's row of numbers, by rank: exact float64, the same on all ranks."""
        if self.control is None:
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.control)
        return [r.tolist() for r in rows]

    def sum(self, row: Sequence[float]) -> list[float]:
        """Column sums over ranks, added in the order of ranks."""
        return [sum(column) for column in zip(*self.exchange(row), strict=True)]

    def known(self, row: Sequence[float]) -> list[float]:
        """The same where the ranks of a tensor group have read the same: each counts once. Nothing is sent for []."""
        return self.sum(row if self.speaks else [0.0] * len(row)) if row else []

    def max(self, row: Sequence[float]) -> list[float]:
        """Column maxima over ranks."""
        return [max(column) for column in zip(*self.exchange(row), strict=True)]

    def least(self, number: torch.Tensor) -> torch.Tensor:
        """The least of a number on the device over the ranks; it is overwritten, and the host does not wait."""
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MIN)
        return number

    def add_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor on the CPU, which is overwritten."""
        if self.control is not None:
            dist.all_reduce(numbers, group=self.control)
        return numbers

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, by rank, on all ranks."""
        if self.control is None:
            return [text]
        mine = _bytes(text)
        lengths = [int(row[0]) for row in self.exchange([mine.numel()])]
        padded = torch.zeros(max(max(lengths), 1), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self.control)
        return [t[:n].numpy().tobytes().decode() for t, n in zip(texts, lengths, strict=True)]

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text on all ranks; what the others pass is not looked at."""
        if self.control is None:
            return text
        content = _bytes(text if self.first else "")
        length = torch.tensor([content.numel()])
        dist.broadcast(length, 0, group=self.control)
        content = content if self.first else torch.empty(int(length), dtype=torch.uint8)
        if length:
            dist.broadcast(content, 0, group=self.control)
        return content.numpy().tobytes().decode()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.exchange([0.0])


def join(plan: Plan, environ: Mapping[str, str] | None = None) -> World:
    """Find this process's place and meet the others. Raises Refusal where the allocation differs from the plan."""
    place = place_from_environment(os.environ if environ is None else environ, plan.layout)
    device = _device(plan, place)
    return World(
        place=place,
        layout=plan.layout,
        device=device,
        data_rank=plan.layout.data_coordinate(place.rank),
        data_size=plan.layout.data_parallel,
        # FSDP and DeepSpeed want a process group even for one rank.
        timeout=timedelta(seconds=plan.train.collective_timeout),
        control=_meet(plan, place, device) if plan.layout.world_size > 1 or plan.train.strategy != "ddp" else None,
    )


def _meet(plan: Plan, place: Place, device: torch.device) -> dist.ProcessGroup:
    timeout = timedelta(seconds=plan.train.collective_timeout)
    dist.init_process_group(
        plan.resources.backend,
        rank=place.rank,
        world_size=plan.layout.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    return control


def _device(plan: Plan, place: Place) -> torch.device:
    """One GPU per rank: the only one this process sees, or the one with its number on the node."""
    if plan.resources.accelerator == "cpu":
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if seen != 1 and seen <= place.local_rank:
        raise refuse(
            f"rank {place.rank} is number {place.local_rank} on its node, but this process sees {seen} GPUs",
            value=os.environ.get("CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES is not set"),
            hint="compare the GPUs asked for with the ranks per node: hpcft plan",
        )
    device = torch.device("cuda", 0 if seen == 1 else place.local_rank)
    torch.cuda.set_device(device)
    return device


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
