"""AdamW on masters, the same numbers whatever holds them; and its state as a checkpoint has it.

Moments have the masters' type. In bfloat16 an update that is smaller than half a step between two numbers (1/512 to
1/256 of a weight) changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hpcft.plan.plan import OptimPlan
from hpcft.run.manifest import PARTS


def groups(
    masters: Iterable[torch.Tensor],
    optim: OptimPlan,
    matrix: Callable[[torch.Tensor], bool] = lambda m: m.dim() >= 2,
    resting: Iterable[torch.Tensor] = (),
) -> list[dict[str, Any]]:
    """Parameter groups: only matrices decay, biases and norms do not; nor do those that rest, which nothing teaches."""
    every, still = list(masters), {id(m) for m in resting}
    decaying = [m for m in every if matrix(m) and id(m) not in still]
    moved = {id(m) for m in decaying}
    found = [
        {"params": decaying, "weight_decay": optim.weight_decay},
        {"params": [m for m in every if id(m) not in moved], "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def settings(optim: OptimPlan) -> dict[str, Any]:
    """AdamW's constants (Loshchilov and Hutter, 2019)."""
    return {"lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.epsilon}


def adamw(
    masters: Iterable[torch.Tensor], optim: OptimPlan, device: torch.device, resting: Iterable[torch.Tensor] = ()
) -> torch.optim.AdamW:
    """torch's AdamW: fused on GPUs, one launch for many tensors on CPUs. resting: as for ``groups``.

    In bfloat16 fused there, too: it computes in float32 and rounds once, the other rounds after each operation.
    """
    every = list(masters)
    fused = device.type == "cuda" or any(m.dtype is torch.bfloat16 for m in every)
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups(every, optim, resting=resting), **settings(optim), **how)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def part_of(optimizer: torch.optim.Optimizer, master: torch.Tensor, part: str) -> torch.Tensor:
    """The master itself or one of its moments, which are zero before the first step."""
    if part == "master":
        return master
    state = optimizer.state.get(master)
    return state[part] if state else torch.zeros_like(master)


def set_moments(
    optimizer: torch.optim.AdamW, master: torch.Tensor, moments: Mapping[str, torch.Tensor], updates: int
) -> None:
    """Moments after ``updates`` steps. A state that AdamW has not made yet is left for it to make."""
    if updates:
        # AdamW counts in a tensor; its fused form wants it on the device.
        where = master.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[master] = {**moments, "step": torch.tensor(float(updates), device=where)}


MOMENTS = PARTS[1:]
