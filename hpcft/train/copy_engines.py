"""Messages of a node's ranks that no processor of a GPU carries: each rank copies what it needs from the others.

NCCL sends by kernels, which hold some of the processors that the passes beside them could use. Here a message is a few
copies out of buffers that all ranks can read, torch's symmetric memory, made by the GPU's copy engines between two
barriers. What is no message of a layer stays NCCL's, and so does every message where GPUs cannot read each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, count, pairwise
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from hpcft.plan.plan import Plan
from hpcft.train.world import World

LINKED = 100.0  # GB/s from one GPU to those of its node: more than PCIe


class Readable(Protocol):
    """One buffer of every rank, as torch's symmetric memory has it."""

    def get_buffer(self, rank: int, sizes: torch.Size, dtype: torch.dtype, /) -> torch.Tensor:
        """The beginning of a rank's buffer."""

    def barrier(self, channel: int, /) -> None:
        """Queued: what comes after it begins when every rank has come to it."""


def linked(plan: Plan, world: World) -> bool:
    """Do GPUs of a node have links of their own, as far as the plan knows?"""
    return world.device.type == "cuda" and plan.memory is not None and plan.memory.hardware.node_bandwidth >= LINKED


def symmetric(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size]: memory that others may be given to read. Raises RuntimeError where there is none."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        raise RuntimeError("NCCL_P2P_DISABLE is set")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # a switch has few groups, and none is used here
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(size, dtype=torch.uint8, device=device)


def shared(memory: torch.Tensor, group: dist.ProcessGroup) -> Readable:
    """Symmetric memory, after all ranks of ``group`` have come with theirs. Raises RuntimeError where that fails."""
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.rendezvous(memory, group.group_name)


class Buffers:
    """Buffers of one size that all ranks of a group can read. Every rank takes them in the same turn."""

    def __init__(self, rank: int, ranks: int, memory: Sequence[torch.Tensor], readable: Sequence[Readable]) -> None:
        self.rank, self.ranks, self.turn, self.memory = rank, ranks, count(), memory
        self.readable = {one.data_ptr(): way for one, way in zip(memory, readable, strict=True)}

    def take(self, numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The next buffer's beginning, [numbers]; memory of this rank alone where they are too many."""
        size = numbers * dtype.itemsize
        if size > self.memory[0].numel():
            return torch.empty(numbers, dtype=dtype, device=device)
        return self.memory[next(self.turn) % len(self.memory)][:size].view(dtype)

    def hold(self, message: torch.Tensor) -> bool:
        """Did this message come from ``take``, and can it be read?"""
        return message.data_ptr() in self.readable

    def read(self, message: torch.Tensor, into: torch.Tensor, part: Callable[[int], int]) -> None:
        """Queue: piece r of ``into`` becomes piece ``part(r)`` of rank r's message, for all other ranks r.

        There are as many pieces as ranks. Before it every rank has its message there, after it nobody reads any.
        """
        readable, pieces = self.readable[message.data_ptr()], into.chunk(self.ranks)
        readable.barrier(0)
        for step in range(1, self.ranks):
            other = (self.rank + step) % self.ranks  # each rank begins with another one
            theirs = readable.get_buffer(other, message.shape, message.dtype)
            pieces[other].copy_(theirs.chunk(self.ranks)[part(other)], non_blocking=True)
        readable.barrier(1)


def buffers(world: World, group: dist.ProcessGroup, size: int, counts: Sequence[int]) -> list[Buffers] | str:
    """As many of ``size`` bytes as each of ``counts`` says; or why some rank cannot read the others' memory.

    All ranks of the world ask, and have the same answer. None waits for another's memory before all have their own.
    """
    memory = _together(world, lambda: [symmetric(size, world.device) for _ in range(sum(counts))])
    if isinstance(memory, str):
        return memory
    readable = _together(world, lambda: [shared(one, group) for one in memory])
    if isinstance(readable, str):
        return readable
    parts = [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
    return [Buffers(group.rank(), group.size(), memory[part], readable[part]) for part in parts]


T = TypeVar("T")


def _together(world: World, make: Callable[[], T]) -> T | str:
    """What every rank has made; or the first one's reason why it could not, on all of them."""
    made, why = None, ""
    try:
        made = make()
    except (RuntimeError, ImportError, AttributeError) as error:  # of the driver, or of another torch
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    hindered = (f"rank {rank}: {text}" for rank, text in enumerate(world.gather_text(why)) if text)
    return next(hindered, cast("T", made))


class CopyingGather:
    """FSDP's gather of a layer's weights; ``held`` has two buffers at least.

    FSDP fills one while it takes the weights out of the one before, and before it fills a third it has done so, but for
    a layer that a backward pass fetches and never needs: it must be let go of at that pass's end.
    """

    def __init__(self, held: Buffers) -> None:
        self.held = held

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The buffer in which FSDP lays this rank's part, and finds the others'."""
        return self.held.take(math.prod(size), dtype, device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        """Every rank's part, in their order; ``input_tensor`` is this rank's, in its place of ``output_tensor``."""
        if async_op or not self.held.hold(output_tensor):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self.held.read(output_tensor, output_tensor, part=lambda rank: rank)
        return None
