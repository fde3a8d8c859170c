"""Learning-rate schedules: pure functions of the step.

With s the steps done, w the warm-up steps, T all steps, f = min_lr_ratio and p = (s − w) / (T − w):

warm-up   (s + 1) / (w + 1)                while s < w; so the first step already moves
linear    f + (1 − f) (1 − p)
cosine    f + (1 − f) (1 + cos πp) / 2     Loshchilov and Hutter, SGDR (2017), one cycle
constant  1
wsd       1 until T − d steps, then linearly to f, d = ⌈decay_ratio × T⌉; Hu et al., MiniCPM (2024)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hpcft.plan.plan import OptimPlan
from hpcft.plan.steps import ROUNDING, warmup_steps


def learning_rate(optim: OptimPlan, step: int, total: int) -> float:
    """The learning rate of the optimizer step after ``step`` done ones, of ``total``."""
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return optim.learning_rate * (step + 1) / (warmup + 1)
    return optim.learning_rate * SHAPES[optim.schedule](optim, step, warmup, total)


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _linear(optim: OptimPlan, step: int, warmup: int, total: int) -> float:
    floor = optim.min_lr_ratio
    return floor + (1 - floor) * (1 - _progress(step, warmup, total))


def _cosine(optim: OptimPlan, step: int, warmup: int, total: int) -> float:
    floor = optim.min_lr_ratio
    return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, warmup, total))) / 2


def _constant(optim: OptimPlan, step: int, warmup: int, total: int) -> float:
    return 1.0


def _wsd(optim: OptimPlan, step: int, warmup: int, total: int) -> float:
    decay = math.ceil(optim.decay_ratio * total - ROUNDING)
    floor = optim.min_lr_ratio
    return floor + (1 - floor) * (1 - _progress(step, max(warmup, total - decay), total))


SHAPES: dict[str, Callable[[OptimPlan, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
