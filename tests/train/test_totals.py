"""Metrics are sums over counts: of micro batches, ranks and steps alike, and across a stop."""

from __future__ import annotations

import io
import math

import torch

from hpcft.train.console import Console, told_of
from hpcft.train.progress import Progress
from hpcft.train.protocols import Loss, Mean
from hpcft.train.report import ROW, Interval, Report
from hpcft.train.stopping import Asked
from hpcft.train.totals import Sums, Totals, add, means
from tests.plans import layout


def loss(value: float, total: float, number: int) -> Loss:
    return Loss(torch.tensor(value), {"kl": Mean(torch.tensor(total), number)})


def test_micro_batches_add_up_to_one_row() -> None:
    totals = Totals(torch.device("cpu"))
    totals.add(loss(2.0, 3.0, 2), 2)
    totals.add(loss(0.5, 1.0, 1), 1)
    assert totals.asked(torch.tensor(7.0))() == (2.5, [4.0, 3], [7.0])
    assert totals.units == 3
    assert totals.named([8.0, 6.0]) == {"kl": [8.0, 6.0]}


def test_nothing_measured_is_no_number_and_margins_follow_from_rewards() -> None:
    shown = means({"rewards/chosen": [3.0, 2.0], "rewards/rejected": [1.0, 4.0], "kl": [0.0, 0.0]})
    assert shown["rewards/margins"] == 1.25
    assert math.isnan(shown["kl"])


def test_an_interval_weighs_steps_by_what_they_counted_and_survives_a_stop() -> None:
    rows = [[1.0] * len(ROW)]
    reports = [
        Report(1, (0,), rows, 1e-4, Asked(None, False), layout(1, 1), {"kl": [total, count]})
        for total, count in ((3, 1), (0, 2))
    ]
    progress = Progress()
    Interval(progress).add(reports[0])
    resumed = Progress.from_json(progress.to_json())
    interval = Interval(resumed)
    interval.add(reports[1])
    assert interval.line(reports[1], 0.0, 1.0)["kl"] == 1.0
    assert resumed.interval_metrics == {}


def test_a_checkpoint_from_before_objectives_counted_units_is_read() -> None:
    old = {"step": 3, "interval_loss": 2.0, "interval_trained": 40}
    assert Progress.from_json(old).interval_units == 40


def test_sums_grow() -> None:
    sums: Sums = {}
    for total in (1.0, 2.0):
        add(sums, {"kl": [total, 1.0]})
    assert sums == {"kl": [3.0, 2.0]}


def test_the_console_shows_what_a_person_watches() -> None:
    stream = io.StringIO()
    line = {"step": 1, "epoch": 0.1, "loss": 0.5, "learning_rate": 1e-4, "tokens_per_second": 10.0}
    Console(True, 0, 9, stream).step({**line, "rewards/accuracies": 0.75, "rewards/margins": 1.5, "logps/chosen": -3.0})
    assert "loss 0.5000  accuracy 0.750  margin 1.500  lr" in stream.getvalue()


def test_the_console_leaves_out_the_margin_of_a_step_whose_answers_are_all_good() -> None:
    assert told_of({"rewards/margins": math.nan, "kl": 0.5}) == "  kl 0.500"
