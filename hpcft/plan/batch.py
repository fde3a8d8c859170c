"""Batch arithmetic: windows per optimizer step = micro batch × accumulation × data-parallel ranks.

``auto`` only chooses how many windows go through one forward pass; the optimizer step is the same for any choice.
"""

from __future__ import annotations

from hpcft.errors import refuse
from hpcft.plan.plan import BatchPlan

DEFAULT_GLOBAL_WINDOWS = 16  # ms-swift fills up to this when nothing is said
AUTO_TOKENS = 8192  # tokens of one forward pass that auto aims at


def plan_batch(
    *,
    data_parallel: int,
    max_length: int,
    global_windows: int | None,
    micro: int | None,
    accumulation: int | None,
    eval_windows: int,
    where: str = "",
) -> BatchPlan:
    """Fill in what was not said. micro None: auto. Raises Refusal where the numbers do not multiply out.

    data_parallel: ranks that read different windows. max_length: tokens in a window.
    """
    unit = data_parallel * (micro or 1) * (accumulation or 1)  # a global batch is a multiple of it
    said_both = bool(micro and accumulation)  # then it is that very number
    if global_windows is None:
        if accumulation is None:
            per_rank = max(1, -(-DEFAULT_GLOBAL_WINDOWS // data_parallel))
            if micro is not None:
                per_rank = micro * -(-per_rank // micro)
        else:
            per_rank = accumulation * (micro or _auto_micro(None, max_length))
        global_windows = per_rank * data_parallel
    elif global_windows % data_parallel:
        raise refuse(
            f"train.global_batch_size: {global_windows} windows do not divide among {data_parallel} ranks",
            where=where, value=global_windows, choices=[unit] if said_both else _nearest(global_windows, unit),
        )  # fmt: skip
    per_rank = global_windows // data_parallel
    if micro is None:
        micro = per_rank // accumulation if accumulation and per_rank % accumulation == 0 else None
        micro = micro or _auto_micro(per_rank, max_length)
    accumulation = accumulation or max(1, per_rank // micro)
    if micro * accumulation != per_rank:
        raise refuse(
            f"train: {micro} windows × {accumulation} accumulation × {data_parallel} ranks = "
            f"{micro * accumulation * data_parallel}, not the global_batch_size of {global_windows}",
            where=where, value=global_windows, choices=[unit] if said_both else _nearest(global_windows, unit),
            hint="leave out one of per_device_train_batch_size, gradient_accumulation_steps, global_batch_size",
        )  # fmt: skip
    return BatchPlan(
        global_windows=global_windows, micro_windows=micro, accumulation=accumulation, eval_windows=eval_windows
    )


def _auto_micro(per_rank: int | None, max_length: int) -> int:
    """The most windows that divide the rank's share and stay within the token aim; at least one."""
    most = max(1, AUTO_TOKENS // max_length)
    return next((n for n in range(most, 0, -1) if per_rank is None or per_rank % n == 0), 1)


def _nearest(wanted: int, step: int) -> list[int]:
    below = wanted // step * step
    return [n for n in (below, below + step) if n > 0]
