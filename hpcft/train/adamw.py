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


def build(masters: Iterable[torch.Tensor], optim: OptimPlan, resting: Iterable[torch.Tensor] = ()) -> torch.optim.AdamW:
    """torch's fused AdamW: it computes in float32 and rounds once, whatever the masters' type. resting: as above."""
    return torch.optim.AdamW(groups(masters, optim, resting=resting), **settings(optim), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step(optimizer: torch.optim.AdamW, learning_rate: float, divisor: torch.Tensor, good: torch.Tensor) -> None:
    """One step with the gradients over ``divisor``; masters, moments and their count stay where ``good`` is 0.

    The kernel looks at both where it runs, so a device goes on while the host still waits for the step's numbers.
    """
    set_rate(optimizer, learning_rate)
    where = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale, optimizer.found_inf = divisor.to(where), (1 - good).to(where)  # type: ignore[attr-defined]
    optimizer.step()


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
        optimizer.state[master] = {**moments, "step": count(updates, master.device)}


def count(updates: int, device: torch.device) -> torch.Tensor:
    """The steps done, as the fused AdamW keeps them: a tensor beside the masters."""
    return torch.tensor(float(updates), device=device)


MOMENTS = PARTS[1:]
