"""Evaluation: the loss per trained token over the whole validation split, the same number on any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hpcft.plan.plan import Plan
from hpcft.train.batches import ahead, collate, on_device, untrained
from hpcft.train.order import Order
from hpcft.train.progress import Progress
from hpcft.train.protocols import Batch, Objective, Sharded, Windows
from hpcft.train.stopping import Stopping
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
            sums = self._sums()
        finally:
            self.sharded.model.train()
        if sums is None:
            return None
        loss, units = self.world.sum(sums)
        mean = loss / units if units else math.nan
        best = self.progress.judge(mean)
        seconds = time.perf_counter() - started
        return {
            "step": self.progress.step,
            "eval_loss": mean,
            "eval_trained_tokens": int(units),
            "eval_seconds": round(seconds, 3),
            "eval_best": best,
        }

    @property
    def hopeless(self) -> bool:
        """Has it been worse than the best for as many evaluations as the plan has patience?"""
        patience = self.plan.train.early_stopping_patience
        return patience > 0 and self.progress.worse >= patience

    @torch.no_grad()
    def _sums(self) -> list[float] | None:
        """This rank's summed loss and units. Every rank makes the same number of forward passes."""
        loss, units = torch.zeros((), dtype=torch.float64, device=self.world.device), 0
        for made in ahead(self._makers(), self.plan.train.dataloader_workers):
            if self.stopping.stop_asked():
                return None
            batch = on_device(made, self.world.device)
            loss += self.objective.loss(self.sharded.model, batch).value.double()
            units += self.objective.count(batch)
        return [loss.item(), float(units)] if self.world.speaks else [0.0, 0.0]

    def _makers(self) -> Iterator[Callable[[], Batch]]:
        """Chunk r of every round of data_size chunks; a rank without one repeats the first, with nothing to count."""
        assert self.windows is not None
        size, per_forward, ranks = len(self.windows), self.plan.batch.eval_windows, self.world.data_size
        for start in range(0, size, per_forward * ranks):
            first = start + self.world.data_rank * per_forward
            ids = tuple(range(first, min(first + per_forward, size)))
            yield partial(self._make, ids)

    def _make(self, ids: tuple[int, ...]) -> Batch:
        assert self.windows is not None
        chosen = ids or (0,)
        multiple = self.plan.layout.degree("tp")
        batch = collate([self.windows[i] for i in chosen], self.plan.data.packing, chosen, multiple)
        return batch if ids else untrained(batch)
