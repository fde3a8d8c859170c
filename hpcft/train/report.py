"""What one optimizer step came to, summed over the ranks, and the line of metrics made of it."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpcft.errors import refuse
from hpcft.plan.layout import Layout
from hpcft.train.order import shares
from hpcft.train.progress import Progress
from hpcft.train.stopping import Asked
from hpcft.train.totals import add, means

# What each rank puts into a step's one exchange, in this order; total and count
# of every metric of the objective and the two flags of ``stopping`` follow.
ROW = ("loss", "units", "tokens", "trained", "seconds", "waited", "memory", "save_failed", "norm", "good")


class NotFinite(Exception):
    """Loss or gradients that are no numbers; raised on all ranks together."""

    def __init__(self, report: Report, per_forward: int) -> None:
        self.step, self.windows = report.step, report.suspects(per_forward)
        super().__init__(
            f"step {self.step}: loss {report.mean_loss}, gradient norm {report.norm} (nothing was saved from it); "
            f"windows {_some(self.windows)}"
        )


@dataclass(frozen=True)
class Report:
    """One step. step: its number, from 1. rows: one per rank of ``layout``, as ROW names them.

    sums: metrics, over all ranks.
    """

    step: int
    windows: tuple[int, ...]
    rows: Sequence[Sequence[float]]
    learning_rate: float
    asked: Asked
    layout: Layout
    sums: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def total(self, name: str) -> float:
        """The sum over ranks."""
        return sum(self._column(name))

    def _column(self, name: str) -> list[float]:
        at = ROW.index(name)
        return [row[at] for row in self.rows]

    @property
    def save_failed(self) -> bool:
        """Has any rank seen the save that was under way fail?"""
        return any(self._column("save_failed"))

    @property
    def mean_loss(self) -> float:
        """Per unit of the global batch."""
        return self.total("loss") / max(self.total("units"), 1)

    @property
    def norm(self) -> float:
        """Of the unclipped gradients; one that is no number on any rank is none for all of them."""
        norms = self._column("norm")
        return next((norm for norm in norms if not math.isfinite(norm)), max(norms))

    def check_clipping(self, max_norm: float) -> None:
        """Raises Refusal where ranks would scale the same gradients differently: their weights would drift apart."""
        norms = self._column("norm")
        if self.finite and min(norms) < max(norms) and 0 < max_norm < max(norms):
            raise refuse(
                f"step {self.step}: the ranks reckon the norm of the same gradients differently",
                value=", ".join(sorted({f"{norm:.9g}" for norm in norms})),
                hint="ask for nodes of one kind, or set max_grad_norm: 0",
            )

    @property
    def finite(self) -> bool:
        """What the devices went by: losses and norm are numbers on all ranks, or none of them was updated."""
        return all(self._column("good"))

    @property
    def loss_finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self._column("loss"))

    def suspects(self, per_forward: int) -> list[int]:
        """The windows of the ranks whose loss is not finite; all of the step's where only the gradients are not."""
        ranks = [rank for rank, loss in enumerate(self._column("loss")) if not math.isfinite(loss)]
        if not ranks:
            return list(self.windows)
        of = self.layout
        readers = [(of.data_coordinate(rank), of.data_parallel) for rank in ranks]
        return [w for reader in readers for s in shares(self.windows, per_forward, *reader) for w in s.windows]

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(self._column("seconds"))

    @property
    def waited(self) -> float:
        """Share of the time in which the average rank waited for data."""
        return self.total("waited") / max(self.total("seconds"), 1e-9)

    @property
    def memory(self) -> int:
        """Peak bytes on the fullest rank: of the GPU, or of the process."""
        return int(max(self._column("memory")))


@dataclass
class Interval:
    """Steps since the last line of metrics. Sums of the loss live in ``Progress``, so that they survive a stop."""

    progress: Progress
    tokens: float = 0.0
    trained: float = 0.0
    seconds: float = field(default=0.0)
    peak: int = 0  # bytes, of the whole attempt

    def add(self, report: Report) -> None:
        self.peak = max(self.peak, report.memory)
        if report.finite:
            self.progress.interval_loss += report.total("loss")
            self.progress.interval_units += int(report.total("units"))
            add(self.progress.interval_metrics, report.sums)
        self.tokens += report.total("tokens")
        self.trained += report.total("trained")
        self.seconds += report.seconds

    def line(self, report: Report, epoch: float, scale: float) -> dict[str, Any]:
        """The line of metrics, and a new interval."""
        at = self.progress
        loss = at.interval_loss / at.interval_units if at.interval_units else math.nan
        line = {
            "step": at.step,
            "epoch": round(epoch, 6),
            "loss": loss if report.finite else report.mean_loss,
            **means(at.interval_metrics if report.finite else report.sums),
            "learning_rate": report.learning_rate,
            "grad_norm": report.norm,
            "tokens": at.tokens,
            "trained_tokens": at.trained_tokens,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "trained_tokens_per_second": self.trained / max(self.seconds, 1e-9),
            "step_seconds": report.seconds,
            "data_wait_share": round(report.waited, 4),
            "peak_memory_bytes": report.memory,
            "skipped": at.skipped,
        }
        if scale != 1.0:
            line["loss_scale"] = scale
        if not report.finite:
            line["finite"] = False
        at.interval_loss, at.interval_units, at.interval_metrics = 0.0, 0, {}
        self.tokens = self.trained = self.seconds = 0.0
        return line


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this rank has held, on its GPU or in its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _some(windows: Sequence[int], limit: int = 16) -> str:
    shown = ", ".join(map(str, windows[:limit]))
    return shown if len(windows) <= limit else f"{shown} … ({len(windows)} in all)"
