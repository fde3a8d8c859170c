"""When a checkpoint is written, and what happens when it cannot be."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

from hpcft.plan.plan import CheckpointPlan
from hpcft.run.ledger import Ledger
from hpcft.train.checkpoint import SaveFailed, Store
from hpcft.train.console import Console
from hpcft.train.progress import Progress
from hpcft.train.protocols import Sharded
from hpcft.train.signals import Signals

FAILURES_IN_A_ROW = 2
NOTHING = (-1, -1)  # published by this run


@dataclass
class Saving:
    """Saves by the plan's rules; one interval save may fail, the next must not.

    saved: the step last published, and the step evaluated last as that checkpoint knows it. A stop saves before an
    evaluation is done; without the second number its verdict, done after the resume, would never be published.
    """

    plan: CheckpointPlan
    store: Store
    sharded: Sharded
    progress: Progress
    ledger: Ledger
    console: Console
    signals: Signals
    saved: tuple[int, int]
    _failures: int = field(default=0, init=False)

    def due(self) -> str:
        """Why a save is due after this step: interval or best; "" when none is."""
        step = self.progress.step
        if self.plan.load_best_at_end and self.progress.best_step == step:
            return "best"
        return "interval" if self.plan.save_steps > 0 and step % self.plan.save_steps == 0 else ""

    def save(self, reason: str) -> None:
        """Publish the state unless it is published already. reason: interval, best, stop, end or asked.

        Raises SaveFailed where the save cannot be done without, or failed twice in a row.
        """
        state = (self.progress.step, self.progress.evaluated)
        if self.saved == state:
            return
        started = time.perf_counter()
        try:
            with self.signals.busy():
                folder = self.store.save(self.sharded, self.progress)
        except SaveFailed as error:
            self._failed(reason, error)
            return
        self._failures, self.saved = 0, state
        seconds = time.perf_counter() - started
        if self.store.world.first:
            self.ledger.write("saved", step=self.progress.step, seconds=round(seconds, 3), reason=reason)
        self.console.say(f"saved {folder.name} in {seconds:.1f} s ({reason})")

    def _failed(self, reason: str, error: SaveFailed) -> None:
        self._failures += 1
        if reason in ("stop", "end") or self._failures >= FAILURES_IN_A_ROW:
            raise error
        if self.store.world.first:
            with suppress(OSError):  # what the save met, a full disk say, must not end the run here
                self.ledger.write("save_failed", step=self.progress.step, error=str(error), reason=reason)
        self.console.say(f"WARNING: not saved, the run goes on from the checkpoint before: {error}")
