"""Adapters that read the same input read it once: those of query, key and value, and of an MLP's gate and up.

Such a product, [tokens, hidden] by a rank of 8 or 64, takes as long as reading its input. Three read it three times
forward and three times for their own gradients, and write three gradients of its size, which are then added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.functional import linear

from hpcft.catalog import STRATEGIES
from hpcft.plan.plan import Plan

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Joined:
    """The first products of some adapters with one input, made when the first of them meets it."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        self.members = list(members)
        self.input: torch.Tensor | None = None
        self.products: dict[int, torch.Tensor] = {}  # of those that have not asked yet

    def product(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """[…, rank] of the member at ``place``. Whose input is another tensor, or the same again, has its own made."""
        if x is not self.input:
            weight = torch.cat([member.weight for member in self.members])
            ranks = [member.out_features for member in self.members]
            self.input, self.products = x, dict(enumerate(linear(x, weight).split(ranks, -1)))
        if place not in self.products:
            return linear(x, self.members[place].weight)
        found = self.products.pop(place)
        if not self.products:
            self.input = None  # or it would be kept until the next step
        return found


class Member(nn.Linear):
    """An adapter's first matrix; its name and its parameter are what they were."""

    joined: Joined
    place: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joined.product(self.place, x)


def shares_inputs(plan: Plan) -> bool:
    """May an adapter meet the weights of another? Compiled layers that are recomputed know no memory between them."""
    apart = STRATEGIES[plan.train.strategy].gathers_by_module or plan.layout.degree("tp") > 1
    return plan.tuner.kind == "lora" and plan.train.recomputation == "none" and not apart


def share_inputs(model: nn.Module) -> None:
    """Join the adapters of a peft model that share an input. Not where each drops numbers of its own, nor for DoRA."""
    for parent in list(model.modules()):
        for names in SHARING:
            layers = [getattr(parent, name, None) for name in names]
            first = [_first_matrix(layer) for layer in layers]
            members = [m for m in first if m is not None]
            if len(members) > 1:
                joined = Joined(members)
                for place, matrix in enumerate(members):
                    matrix.__class__ = Member
                    member = cast(Member, matrix)
                    member.joined, member.place = joined, place


def _first_matrix(layer: object) -> nn.Linear | None:
    """Of the only adapter of a layer, where it sees the layer's input as it is."""
    matrices, dropouts = getattr(layer, "lora_A", {}), getattr(layer, "lora_dropout", {})
    if len(matrices) != 1 or getattr(layer, "lora_variant", {}):
        return None
    [(name, matrix)] = matrices.items()
    return matrix if type(matrix) is nn.Linear and isinstance(dropouts[name], nn.Identity) else None
