"""What the steps of an attempt come to."""

from __future__ import annotations

from hpcft.train.progress import Progress
from hpcft.train.report import ROW, Interval, Report
from hpcft.train.stopping import Asked
from tests.plans import layout


def report(*peaks: int) -> Report:
    """One step of as many ranks, each with its peak of memory."""
    rows = [[float(peak) if name == "memory" else float(name != "save_failed") for name in ROW] for peak in peaks]
    return Report(1, (0,), rows, 1e-4, Asked(None, False), layout(1, len(peaks)))


def test_the_peak_of_memory_is_the_fullest_ranks_over_the_whole_attempt() -> None:
    interval = Interval(Progress())
    assert interval.peak == 0
    for peaks in ((3, 9), (4, 5)):
        interval.add(report(*peaks))
        interval.line(report(*peaks), 0.0, 1.0)
    assert interval.peak == 9


def test_the_windows_of_a_bad_loss_are_those_that_its_rank_read() -> None:
    mesh = layout(1, 4, dp=2, tp=2)
    rows = [[float("nan") if name == "loss" and rank == 2 else 1.0 for name in ROW] for rank in range(4)]
    step = Report(1, (10, 11, 12, 13), rows, 1e-4, Asked(None, False), mesh)
    assert step.suspects(1) == [11, 13], "rank 2 of two tensor groups is the second reader"
