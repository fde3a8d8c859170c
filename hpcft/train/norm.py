"""The norm of gradients that lie in parts on many ranks, to the same bit on all of them."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist

from hpcft.plan.layout import Layout
from hpcft.train.world import World


def global_norm(world: World, cut: torch.Tensor, whole: torch.Tensor, once: str) -> torch.Tensor:
    """The 2-norm, float32. cut, whole: sums of squares of what this rank holds of tensor-parallel parts and of others.

    once: the axis whose ranks hold the same parts; those of its first coordinate count. Squares are added in the order
    of ranks on every rank: sums within different groups need not have the same last bit, and clipping by different
    norms would part the ranks' weights.
    """
    mine = torch.stack([cut, whole]).double()
    if world.size == 1:
        return mine.sum().sqrt().float()
    every = mine.new_empty(world.size * 2)
    dist.all_gather_into_tensor(every, mine)
    return (every.view(world.size, 2) * _counted(world.layout, once, mine.device)).sum().sqrt().float()


@lru_cache
def _counted(layout: Layout, once: str, device: torch.device) -> torch.Tensor:
    """float64 [ranks, 2]: 1 where a rank's squares count, those of what is not cut on one tensor rank only.

    Sent to the device once: the host would wait in every step until all is done that is queued before it.
    """
    places = [layout.place(rank).coordinates for rank in range(layout.world_size)]
    rows = [[float(not at.get(once, 0)), float(not at.get(once, 0) and not at.get("tp", 0))] for at in places]
    return torch.tensor(rows, dtype=torch.float64, device=device)
