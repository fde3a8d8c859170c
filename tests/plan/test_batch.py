"""Batch arithmetic: it closes for every combination, or is refused with the nearest numbers that do."""

from __future__ import annotations

import itertools

import pytest

from hpcft.errors import Refusal
from hpcft.plan.batch import AUTO_TOKENS, plan_batch
from hpcft.plan.plan import BatchPlan

RANKS = (1, 2, 3, 4, 6, 8, 16, 64)


def batch(ranks: int, total: int | None, micro: int | None, accumulation: int | None, length: int = 2048) -> BatchPlan:
    return plan_batch(
        data_parallel=ranks,
        max_length=length,
        global_windows=total,
        micro=micro,
        accumulation=accumulation,
        eval_windows=1,
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_planned_multiplies_out_and_keeps_what_was_said(ranks: int) -> None:
    numbers = (None, 1, 2, 3, 4, 8, 12, 16, 48, 96)
    planned = 0
    for total, micro, accumulation in itertools.product(numbers, (None, 1, 2, 3, 8), (None, 1, 2, 3, 8)):
        try:
            made = batch(ranks, total, micro, accumulation)
        except Refusal:
            assert total is not None, "without a global batch there is nothing to contradict"
            continue
        planned += 1
        assert made.micro_windows * made.accumulation * ranks == made.global_windows
        assert made.global_windows == (total or made.global_windows)
        assert made.micro_windows == (micro or made.micro_windows)
        assert made.accumulation == (accumulation or made.accumulation)
    assert planned >= 25


@pytest.mark.parametrize("ranks", RANKS)
def test_the_offered_global_batches_are_the_nearest_that_work(ranks: int) -> None:
    for total, micro, accumulation in itertools.product(range(1, 70), (None, 1, 3), (None, 2)):
        try:
            batch(ranks, total, micro, accumulation)
        except Refusal as refusal:
            offered = [int(choice) for choice in refusal.problems[0].choices]
        else:
            continue
        working = [n for n in range(1, 900) if works(ranks, n, micro, accumulation)]
        below, above = [n for n in working if n < total], [n for n in working if n > total]
        assert offered == [*below[-1:], *above[:1]]


def works(ranks: int, total: int, micro: int | None, accumulation: int | None) -> bool:
    """Whether a global batch can be had, each condition by itself."""
    share, rest = divmod(total, ranks)
    if micro and accumulation:
        return not rest and micro * accumulation == share
    return not rest and share % (micro or 1) == 0 and share % (accumulation or 1) == 0


def test_nothing_said_fills_up_to_sixteen_windows() -> None:
    assert [batch(ranks, None, None, None).global_windows for ranks in (1, 2, 8, 16, 64)] == [16, 16, 16, 16, 64]


def test_micro_times_accumulation_times_ranks_is_the_seeds_arithmetic() -> None:
    made = batch(2, None, 1, 8)
    assert (made.global_windows, made.micro_windows, made.accumulation) == (16, 1, 8)


@pytest.mark.parametrize("length", [64, 512, 2048, 8192, 32768])
def test_auto_stays_within_its_tokens_and_divides_the_ranks_share(length: int) -> None:
    for total in (8, 24, 56, 128):
        made = batch(8, total, None, None, length)
        assert made.micro_windows == 1 or made.micro_windows * length <= AUTO_TOKENS
        assert (total // 8) % made.micro_windows == 0


def test_auto_changes_the_forward_pass_and_never_the_step() -> None:
    assert {batch(4, 64, micro, None).global_windows for micro in (None, 1, 2, 4, 8, 16)} == {64}


def test_a_contradiction_is_refused_with_the_whole_product() -> None:
    with pytest.raises(Refusal, match=r"2 windows × 4 accumulation × 8 ranks = 64, not the global_batch_size of 32"):
        batch(8, 32, 2, 4)
