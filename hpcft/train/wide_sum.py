"""FSDP2's sum of gradients: sent as they are, in two bytes, and added up in float32.

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


class WideSum:
    """A reduce-scatter for one FSDP unit, whose gradients have the type ``narrow``; the sum has the type it asks for.

    FSDP allocates twice for each, first what is sent, then what is received.
    """

    def __init__(self, narrow: torch.dtype) -> None:
        self.narrow, self.to_send = narrow, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The buffer that FSDP fills with gradients, and then that of their sum."""
        kind, self.to_send = self.narrow if self.to_send else dtype, not self.to_send
        return torch.empty(size, dtype=kind, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """The sum over the ranks, or their mean, of this rank's part of every rank's ``input_tensor``."""
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"{op}: gradients are summed or averaged")
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        added = torch.mean if op == dist.ReduceOp.AVG else torch.sum
        added(parts.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)
