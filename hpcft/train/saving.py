"""When a checkpoint is written, and what happens when it cannot be.

The ranks stop for the copy to the host; writing and publishing run in a thread of each rank while the training goes on.
One at a time: the next save waits for the one before, and so does the end of the run.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpcft.plan.plan import CheckpointPlan
from hpcft.run.ledger import Ledger
from hpcft.train.checkpoint import SaveFailed, Store
from hpcft.train.console import Console
from hpcft.train.progress import Progress
from hpcft.train.protocols import Sharded
from hpcft.train.signals import Signals
from hpcft.train.snapshot import Snapshot

FAILURES_IN_A_ROW = 2
NOTHING = (-1, -1)  # published by this run


@dataclass
class Saving:
    """Saves by the plan's rules; one interval save may fail, the next must not.

    saved: the step last published, and the step evaluated last as that checkpoint knows it. A stop saves before an
    evaluation is done; without the second number its verdict, done after the resume, would never be published.
    underway: a save that is being published, and what it is of.
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
    _underway: tuple[Future[Path], tuple[int, int], str] | None = field(default=None, init=False)
    _reserved: Future[None] | None = field(default=None, init=False)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "saving"), init=False)

    def due(self) -> str:
        """Why a save is due after this step: interval or best; "" when none is."""
        step = self.progress.step
        if self.plan.load_best_at_end and self.progress.best_step == step:
            return "best"
        return "interval" if self.plan.save_steps > 0 and step % self.plan.save_steps == 0 else ""

    def reserve(self) -> None:
        """Begin to take the node's memory for the copy, so that the first save need not stop the ranks for it.

        To be called when the optimizer has its moments.
        """
        if self.plan.save_steps > 0 and self._reserved is None:
            wanted = self.store.host.wanted(self.sharded)
            self._reserved = self._thread.submit(self.store.host.reserve, wanted)

    def save(self, reason: str) -> None:
        """Publish the state unless it is published already. reason: interval, best, stop, end or asked.

        Called by all ranks. What ends the run waits until the checkpoint is there; else only until the state is copied.
        Raises SaveFailed where a save cannot be done without, or failed twice in a row; perhaps the one before this.
        """
        with self.signals.busy():
            stopped = time.perf_counter()
            self.settle()
            state = (self.progress.step, self.progress.evaluated)
            if self.saved == state:
                return
            started = time.perf_counter()
            if self._reserved is not None:
                wait([self._reserved])  # if it failed, the copy says why
            snapshot = self.store.take(self.sharded, self.progress)
            stall = time.perf_counter() - stopped
            self._underway = self._thread.submit(self._publish, snapshot, reason, started, stall), state, reason
            if reason in ("stop", "end", "asked"):
                self.settle()

    @property
    def failing(self) -> bool:
        """Has the save that is under way failed already, on this rank?"""
        future = self._underway[0] if self._underway else None
        return future is not None and future.done() and future.exception() is not None

    def settle(self) -> None:
        """Wait for the save that is under way, and act on how it ended; all ranks come to the same end."""
        if self._underway is None:
            return
        (future, state, reason), self._underway = self._underway, None
        try:
            future.result()
        except SaveFailed as error:
            self._failed(reason, state[0], error)
            return
        self._failures, self.saved = 0, state

    def _publish(self, snapshot: Snapshot, reason: str, started: float, stall: float) -> Path:
        """In the thread. stall: seconds that the ranks stopped for it, and for the save before where that took long."""
        folder = self.store.publish(snapshot)
        seconds = time.perf_counter() - started
        facts = {"seconds": round(seconds, 3), "stall": round(stall, 3)}
        if self.store.world.first:
            with suppress(OSError):  # the checkpoint is whole, whether the ledger can be told or not
                self.ledger.write("saved", step=snapshot.step, reason=reason, **facts)
        self.console.say(f"saved {folder.name} in {seconds:.1f} s ({reason})")
        return folder

    def _failed(self, reason: str, step: int, error: SaveFailed) -> None:
        self._failures += 1
        if reason in ("stop", "end") or self._failures >= FAILURES_IN_A_ROW:
            raise error
        if self.store.world.first:
            with suppress(OSError):  # what the save met, a full disk say, must not end the run here
                self.ledger.write("save_failed", step=step, error=str(error), reason=reason)
        self.console.say(f"WARNING: not saved, the run goes on from the checkpoint before: {error}")
