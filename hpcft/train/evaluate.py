"""Evaluation: the loss per unit over the whole validation split, the same number on any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hpcft.plan.plan import Plan
from hpcft.train.batches import ahead, on_device, rounds
from hpcft.train.order import Order
from hpcft.train.progress import Progress
from hpcft.train.protocols import Batch, Objective, Sharded, Windows
from hpcft.train.stopping import Stopping
from hpcft.train.totals import Totals, means
from hpcft.train.world import World


@dataclass
class Evaluation:
    """When to evaluate, and how. windows: the validation split, None when there is none."""

    plan: Plan
    world: World
    sharded: Sharded
    objective: Objective
    windows: Windows | None
    order: Order
    progress: Progress
    stopping: Stopping
    total_steps: int

    def due(self) -> bool:
        """After this step: every eval_steps, or with 0 at the end of each epoch; and at the end of the run."""
        every, at = self.plan.train.eval_steps, self.progress
        if not self.windows or every < 0 or at.step == 0 or at.evaluated == at.step:
            return False
        if every > 0 and at.step % every == 0:
            return True
        return at.step >= self.total_steps or (every == 0 and self.order.ends_epoch(at.consumed))

    def run(self) -> dict[str, Any] | None:
        """Metrics of one evaluation; None when a stop was asked for meanwhile: it is done again after the resume."""
        started = time.perf_counter()
        self.sharded.model.eval()
        try:
            totals = self._totals()
        finally:
            self.sharded.model.train()
        if totals is None:
            return None
        own, measured, _ = totals.read()
        row = [own, totals.units, *measured]
        loss, units, *sums = self.world.sum(row if self.world.speaks else [0.0] * len(row))
        mean = loss / units if units else math.nan
        best = self.progress.judge(mean)
        seconds = time.perf_counter() - started
        return {
            "step": self.progress.step,
            "eval_loss": mean,
            "eval_units": int(units),
            **{f"eval_{name}": value for name, value in means(totals.named(sums)).items()},
            "eval_seconds": round(seconds, 3),
            "eval_best": best,
        }

    @property
    def hopeless(self) -> bool:
        """Has it been worse than the best for as many evaluations as the plan has patience?"""
        patience = self.plan.train.early_stopping_patience
        return patience > 0 and self.progress.worse >= patience

    @torch.no_grad()
    def _totals(self) -> Totals | None:
        """This rank's sums; None where a stop was asked for. Every rank makes the same number of forward passes."""
        totals = Totals(self.world.device)
        known = self.world.known(self.objective.ahead(self.sharded.model, self._batches()))
        for batch in self._batches():
            totals.add(self.objective.loss(self.sharded.model, batch, known), self.objective.count(batch))
        return None if self.stopping.stop_asked() else totals

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches of the whole split, until a stop is asked for."""
        assert self.windows is not None
        at = self.world.data_rank, self.world.data_size
        for made in ahead(rounds(self.windows, self.plan.batch.eval_windows, self.plan, *at),
                          self.plan.train.dataloader_workers):  # fmt: skip
            if self.stopping.stop_asked():
                return
            yield on_device(made, self.world.device)
