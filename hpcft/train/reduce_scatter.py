"""A reduce-scatter for FSDP2 that sends gradients as they are, in two bytes, and adds them up in float32.

torch widens gradients before it sends them, so that a ring can add them up on its way in float32: four bytes of every
number in memory and on the links. Here each rank is sent its part by every other and adds the parts itself: the same
sum of half the bytes, which are taken from a backward pass that needs memory and links too. Where a group leaves its
node the ring is the better one: one sum crosses there, and not the parts of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class AllToAllReduceScatter:
    """For one FSDP unit, whose gradients have the type ``narrow``; their sum has the type that FSDP asks for.

    FSDP allocates twice for each, first what is sent, then what is received.
    """

    def __init__(self, narrow: torch.dtype) -> None:
        self.narrow, self.sends = narrow, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The buffer that FSDP fills with gradients, and then that of their sum."""
        kind, self.sends = self.narrow if self.sends else dtype, not self.sends
        return torch.empty(size, dtype=kind, device=device)

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
        dist.all_to_all_single(parts, input_tensor, group=group)
        added = torch.mean if op == dist.ReduceOp.AVG else torch.sum
        added(parts.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)
