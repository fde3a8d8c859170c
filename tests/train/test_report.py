"""What the steps of an attempt come to."""

from __future__ import annotations

from hpcft.plan import activations
from hpcft.train import head
from hpcft.train.progress import Progress
from hpcft.train.report import ROW, Interval, Report
from hpcft.train.stopping import Asked


def report(*peaks: int) -> Report:
    """One step of as many ranks, each with its peak of memory."""
    rows = [[float(peak) if name == "memory" else 1.0 for name in ROW] for peak in peaks]
    return Report(1, (0,), rows, 1e-4, Asked(None, False))


def test_the_peak_of_memory_is_the_fullest_ranks_over_the_whole_attempt() -> None:
    interval = Interval(Progress())
    assert interval.peak == 0
    for peaks in ((3, 9), (4, 5)):
        interval.add(report(*peaks))
        interval.line(report(*peaks), 0.0, 1.0)
    assert interval.peak == 9


def test_memory_is_foretold_for_the_chunks_of_logits_that_the_objective_makes() -> None:
    assert activations.CHUNK_LOGITS == head.CHUNK_LOGITS
