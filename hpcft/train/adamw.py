"""AdamW on masters, the same numbers whatever holds them; and its state as a checkpoint has it.

Moments have the masters' type. In bfloat16 an update that is smaller than half a step between two numbers (1/512 to
1/256 of a weight) changes nothing.

torch's fused kernel moves a master, its moments and its gradient at two thirds of the memory's speed, writes the
gradient back, and knows nothing of working copies. Where layers are compiled, large masters are stepped with by a
compiled program, a single pass that writes the copies too; small ones stay torch's, many to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hpcft.plan.plan import OptimPlan
from hpcft.run.manifest import PARTS

MOMENTS = PARTS[1:]
LARGE = 2**21  # numbers of a master that is worth a kernel of its own: to call it takes the host some 40 µs
Large = tuple[Mapping[str, Any], dict[torch.Tensor, torch.Tensor]]  # a group, and gradients by its large masters
NO_COPIES: Mapping[torch.Tensor, torch.Tensor] = {}
_compiled_for = ""  # the type of device whose masters ``_update`` has been compiled for


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


def step(
    optimizer: torch.optim.AdamW,
    learning_rate: float,
    divisor: torch.Tensor,
    good: torch.Tensor,
    copies: Mapping[torch.Tensor, torch.Tensor] = NO_COPIES,
    done: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """One step with the gradients over ``divisor``; masters, moments and their count stay where ``good`` is 0.

    The kernel looks at both where it runs, so a device goes on while the host still waits for the step's numbers.
    copies: master → what is computed with, in another type. Gradients are used up. done: told of each large master as
    soon as its step is queued, in the optimizer's order; small ones come before.
    """
    set_rate(optimizer, learning_rate)
    where = optimizer.param_groups[0]["params"][0].device
    divisor, good = divisor.to(where), good.to(where)
    large = _set_aside(optimizer) if where.type == _compiled_for else []
    optimizer.grad_scale, optimizer.found_inf = divisor, 1 - good  # type: ignore[attr-defined]
    optimizer.step()
    apart = {master for _, gradients in large for master in gradients}
    follow({master: copy for master, copy in copies.items() if master not in apart})
    for group, gradients in large:
        _step_compiled(optimizer, group, gradients, divisor, good, copies, done)


@torch.no_grad()
def follow(copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Make working copies what their masters are."""
    if copies:
        torch._foreach_copy_(list(copies.values()), list(copies))


def compile_arithmetic(device: torch.device) -> None:
    """From now on large masters on such a device are stepped with by a compiled program, one for each size."""
    global _compiled_for, _update
    _compiled_for, _update = device.type, torch.compile(_update, dynamic=False)


def _set_aside(optimizer: torch.optim.AdamW) -> list[Large]:
    """The large masters of each group, with the gradients that torch's AdamW then no longer sees."""
    found: list[Large] = []
    for group in optimizer.param_groups:
        large = [m for m in group["params"] if m.grad is not None and m.numel() >= LARGE and m.is_contiguous()]
        gradients = {master: master.grad for master in large}
        for master in large:
            master.grad = None
        if gradients:
            found.append((group, gradients))
    return found


@torch.no_grad()
def _step_compiled(
    optimizer: torch.optim.AdamW,
    group: Mapping[str, Any],
    gradients: Mapping[torch.Tensor, torch.Tensor],
    divisor: torch.Tensor,
    good: torch.Tensor,
    copies: Mapping[torch.Tensor, torch.Tensor],
    done: Callable[[torch.Tensor], None] | None,
) -> None:
    """One step of a group's large masters, each with its gradient."""
    for master in gradients:
        if not optimizer.state[master]:
            set_moments(optimizer, master, {part: torch.zeros_like(master) for part in MOMENTS}, 0)
    states = [optimizer.state[master] for master in gradients]
    # All of them have been stepped with equally often: what no gradient came for is stepped with by zeros.
    numbers = _numbers(group, states[0]["step"], divisor, good)
    torch._foreach_add_([state["step"] for state in states], [good] * len(states))
    for (master, gradient), state in zip(gradients.items(), states, strict=True):
        copy, (mean, square) = copies.get(master), (state[part].view(-1) for part in MOMENTS)
        beside = None if copy is None else copy.detach().view(-1)
        _update(master.view(-1), gradient.reshape(-1), mean, square, numbers, group["betas"], beside)
        if done is not None:
            done(master)


def _numbers(group: Mapping[str, Any], count: torch.Tensor, divisor: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """float32 [6], on the device: what a step multiplies with, from constants and the steps done before."""
    rate, (beta1, beta2) = group["lr"], group["betas"]
    done = count.double() + 1
    step_size, correction = rate / (1 - beta1**done), (1 - beta2**done).sqrt()
    decay, epsilon = (torch.full_like(done, value) for value in (rate * group["weight_decay"], group["eps"]))
    return torch.stack([decay, step_size, correction, epsilon, divisor.double(), good.double()]).float()


def _update(
    master: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    numbers: torch.Tensor,
    betas: tuple[float, float],
    copy: torch.Tensor | None,
) -> None:
    """AdamW's algorithm 2 (Loshchilov and Hutter, 2019) on flat tensors, in float32, in the order of torch's kernel."""
    decay, step_size, correction, epsilon, divisor, good = numbers.unbind()
    old, slope = master.float(), gradient.float() / divisor
    first = betas[0] * mean.float() + (1 - betas[0]) * slope
    second = betas[1] * square.float() + (1 - betas[1]) * slope * slope
    new = old - decay * old
    new = new - step_size * first / (second.sqrt() / correction + epsilon)
    for into, value in ((mean, first), (square, second), (master, new)):
        into.copy_(torch.where(good > 0, value, into.float()))
    if copy is not None:
        copy.copy_(master)


def part_of(optimizer: torch.optim.Optimizer, master: torch.Tensor, part: str) -> torch.Tensor:
    """The master itself or one of its moments, which are zero before the first step."""
    if part == "master":
        return master
    state = optimizer.state.get(master)
    return state[part] if state else torch.zeros_like(master)


def set_moments(
    optimizer: torch.optim.AdamW, master: torch.Tensor, moments: Mapping[str, torch.Tensor], updates: int
) -> None:
    """Moments after ``updates`` steps. Without moments, a state that AdamW has not made yet is left for it to make."""
    if moments:
        optimizer.state[master] = {**moments, "step": count(updates, master.device)}


def count(updates: int, device: torch.device) -> torch.Tensor:
    """The steps done, as the fused AdamW keeps them: a tensor beside the masters."""
    return torch.tensor(float(updates), device=device)
