"""The order of windows is a function of seed, epoch and position; schedules are functions of the step."""

from __future__ import annotations

from itertools import islice

import pytest

from hpcft.errors import Refusal
from hpcft.plan.steps import total_steps, warmup_steps
from hpcft.train.optim import learning_rate
from hpcft.train.order import Order, forward_seed, shares
from tests import plans


def test_an_epoch_is_every_window_once_and_the_next_one_is_another_order() -> None:
    order = Order(windows=10, global_windows=4, seed=3)
    steps = list(islice(order.steps(0), 6))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = [[w for step in epoch for w in step] for epoch in (steps[:3], steps[3:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_an_order_never_changes_between_releases() -> None:
    assert [Order(10, 10, 3).step(n) for n in (0, 10)] == [
        (0, 4, 9, 7, 1, 5, 6, 3, 8, 2),
        (0, 6, 2, 1, 3, 7, 4, 9, 8, 5),
    ], "checkpoints in the field would resume into another order"


def test_one_integer_says_where_a_run_stands() -> None:
    order = Order(10, 4, 3)
    steps = list(islice(order.steps(0), 7))
    consumed = sum(len(step) for step in steps[:4])
    assert list(islice(order.steps(consumed), 3)) == steps[4:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("per_forward", [1, 2, 3])
def test_the_ranks_shares_are_the_step_each_window_once(ranks: int, per_forward: int) -> None:
    step = tuple(range(100, 111))
    pieces = [share for rank in range(ranks) for share in shares(step, per_forward, rank, ranks)]
    assert tuple(w for share in sorted(pieces, key=lambda s: s.position) for w in share.windows) == step


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"), [(1.0, -1, 3), (2.0, -1, 6), (1.5, -1, 5), (0.1, -1, 1), (9.0, 7, 7)]
)
def test_total_steps_follow_epochs_or_max_steps(epochs: float, max_steps: int, total: int) -> None:
    optim = plans.plan(optim={"num_train_epochs": epochs, "max_steps": max_steps}).optim
    assert total_steps(optim, 10, 4) == total


def test_a_rounding_of_floating_point_is_no_step_more() -> None:
    assert 2.2 * 25 > 55
    assert total_steps(plans.plan(optim={"num_train_epochs": 2.2, "max_steps": -1}).optim, 25, 1) == 55


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(Refusal, match="no window"):
        Order(0, 4, 0)


def test_forward_seeds_differ_by_seed_step_and_position() -> None:
    seeds = {forward_seed(seed, step, position) for seed in range(3) for step in range(3) for position in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def rates(total: int, **changes: object) -> list[float]:
    optim = plans.plan(optim={"learning_rate": 1.0, **changes}).optim
    return [learning_rate(optim, step, total) for step in range(total)]


def test_constant_with_warmup() -> None:
    assert rates(6, schedule="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_linear_falls_to_its_floor() -> None:
    assert rates(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(4, schedule="linear", min_lr_ratio=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_wsd_decays_at_the_end_only() -> None:
    assert rates(10, schedule="wsd", decay_ratio=0.4) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])


def test_warmup_ratio_is_rounded_up_and_steps_win_over_it() -> None:
    assert warmup_steps(plans.plan(optim={"warmup_ratio": 0.05}).optim, 41) == 3
    assert warmup_steps(plans.plan(optim={"warmup_ratio": 0.1}).optim, 10) == 1
    assert warmup_steps(plans.plan(optim={"warmup_ratio": 0.5, "warmup_steps": 2}).optim, 10) == 2
