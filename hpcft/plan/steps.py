"""How many optimizer steps a run takes and how many of them warm up: one arithmetic for the page and for the ranks."""

from __future__ import annotations

import math

from hpcft.plan.plan import OptimPlan

ROUNDING = 1e-9  # 2.2 epochs of 25 steps are 55 of them, though the product in floating point is a little more


def steps_per_epoch(windows: int, global_windows: int) -> int:
    """Optimizer steps that one pass over ``windows`` takes; the last one may be smaller."""
    return math.ceil(windows / global_windows)


def total_steps(optim: OptimPlan, windows: int, global_windows: int) -> int:
    """Optimizer steps of the whole run: max_steps where it is positive, else epochs × steps per epoch, rounded up."""
    if optim.max_steps > 0:
        return optim.max_steps
    return max(1, math.ceil(optim.num_train_epochs * steps_per_epoch(windows, global_windows) - ROUNDING))


def warmup_steps(optim: OptimPlan, total: int) -> int:
    """warmup_steps where it is positive, else ⌈warmup_ratio × total⌉."""
    return optim.warmup_steps if optim.warmup_steps > 0 else math.ceil(optim.warmup_ratio * total - ROUNDING)
