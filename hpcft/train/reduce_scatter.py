"""A reduce-scatter for FSDP2 that sends gradients as they are, in two bytes, and adds them up in float32.

torch widens gradients before it sends them, so that a ring can add them up on its way in float32: four bytes of every
number in memory and on the links. Here each rank is sent its part by every other and adds the parts itself: the same
sum of half the bytes, which are taken from a backward pass that needs memory and links too. Where a group leaves its
node the ring is the better one: one sum crosses there, and not the parts of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hpcft.train.copy_engines import Buffers

LARGE = 2**21  # numbers of a sum that is worth a program of its own


class AllToAllReduceScatter:
    """For one FSDP unit, whose gradients have the type ``narrow``; their sum has the type that FSDP asks for.

    FSDP allocates twice for each, first what is sent, then what is received, and sends one unit's gradients at a time.
    held: buffers from which the other ranks copy what is sent; without them NCCL sends it.
    """

    def __init__(self, narrow: torch.dtype, held: Buffers | None = None) -> None:
        self.narrow, self.held, self.sends = narrow, held, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The buffer that FSDP fills with gradients, and then that of their sum."""
        self.sends = not self.sends
        if self.sends:
            return torch.empty(size, dtype=dtype, device=device)
        if self.held is not None:
            return self.held.take(math.prod(size), self.narrow, device)
        return torch.empty(size, dtype=self.narrow, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """The sum over the ranks, or their mean, of this rank's part of every rank's ``input_tensor``.

        Raises RuntimeError where an error came between two allocations, so that the buffers have changed places.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"{op}: gradients are summed or averaged")
        if input_tensor.dtype is not self.narrow or not self.sends:
            raise RuntimeError("a sum of gradients was left half made by an earlier error")
        parts = torch.empty_like(input_tensor)
        if self.held is not None and self.held.hold(input_tensor):
            own = self.held.rank
            parts.chunk(self.held.ranks)[own].copy_(input_tensor.chunk(self.held.ranks)[own])
            self.held.read(input_tensor, parts, part=lambda rank: own)
        else:
            dist.all_to_all_single(parts, input_tensor, group=group)
        add = _add if output_tensor.numel() >= LARGE else _add_eagerly
        add(parts.view(group.size(), -1), output_tensor, op == dist.ReduceOp.AVG)


def compile_arithmetic() -> None:
    """From now on large sums are a compiled program: torch's own moves its numbers at half the memory's speed."""
    global _add
    _add = torch.compile(_add_eagerly, dynamic=False)


def _add_eagerly(parts: torch.Tensor, into: torch.Tensor, mean: bool) -> None:
    """Rows become their sum or their mean, of the type of ``into``."""
    (torch.mean if mean else torch.sum)(parts, 0, dtype=into.dtype, out=into)


_add = _add_eagerly
