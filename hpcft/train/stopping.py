"""Being told to stop or to save: the ranks agree at a step edge, rank 0 asks Slurm why, then each cause has its road.

Rank 0 asks *before* anyone saves: in the teardown after a peer's death a collective save would wait for the dead, and
after a scancel nothing may bring the job back. The requeue is the last thing, called once: Slurm ends us for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hpcft.run.ledger import Ledger
from hpcft.run.paths import RunPaths
from hpcft.slurm.cause import Cause, why_signalled
from hpcft.slurm.requeue import requeue
from hpcft.train.signals import NAMES, Signals
from hpcft.train.world import World

ASK_SECONDS = 10.0  # for the cause, before saving: the grace period is running
REQUEUE_SECONDS = 300.0  # with the controller away; Slurm ends us earlier if it must
LOOK_EVERY = 5.0  # seconds between looks for the save-now file


@dataclass(frozen=True)
class Asked:
    """What the ranks agreed on at a step edge. stop: the signal's name, None to go on."""

    stop: str | None
    save: bool


@dataclass
class Stopping:
    """The stop and save flags of this rank, and what to do about them."""

    signals: Signals
    world: World
    paths: RunPaths
    ledger: Ledger
    environ: Mapping[str, str]
    lead: float  # seconds before the end at which Slurm warns
    _looked_at: float = field(default=float("-inf"), init=False)
    _stops: int = field(default=0, init=False)
    _request: int = field(default=0, init=False)  # when the save-now file was written, the last that was seen
    _served: int = field(default=0, init=False)  # … for which a save was made

    def flags(self) -> list[float]:
        """This rank's two numbers for the step's exchange: their maximum over ranks is the agreement."""
        self._stops = self.signals.stops
        return [float(self.signals.code), float(self.signals.save or self._save_now())]

    def agreed(self, flags: Sequence[Sequence[float]]) -> Asked:
        """The agreement, from the flags of all ranks. A step edge has come: the watchdog is told."""
        self.signals.edge()
        stop, save = (int(max(column)) for column in zip(*flags, strict=True))
        if save:
            self.signals.save = False
        return Asked(NAMES[stop], bool(save))

    def look(self) -> Asked:
        """An agreement outside of a step: after loading, during an evaluation."""
        return self.agreed(self.world.exchange(self.flags()))

    def stop_asked(self) -> bool:
        """Has any rank been told to stop? Leaves the flags as they are."""
        self.signals.edge()
        return self.world.max([float(self.signals.code)])[0] > 0

    def _save_now(self) -> bool:
        """Rank 0 looks for the file by which somebody who cannot signal this job asks for a save."""
        if not self.world.first or time.monotonic() - self._looked_at < LOOK_EVERY:
            return False
        self._looked_at = time.monotonic()
        with suppress(OSError):  # it is not there, or the file server fails for a moment
            self._request = os.stat(self.paths.save_now).st_mtime_ns
            return self._request != self._served
        return False

    def saved(self) -> None:
        """A save that was asked for is done. A file that cannot be removed asks for no other."""
        self._served = self._request
        if self.world.first:
            with suppress(OSError):
                self.paths.save_now.unlink()

    def why(self, stop: str, step: int) -> Cause:
        """The cause, as rank 0 hears it from Slurm; the same on all ranks."""
        cause = ""
        with self.signals.busy():
            if self.world.first:
                cause = why_signalled(self.environ, stop, self.lead, ASK_SECONDS).name
                with suppress(OSError):  # the others wait for the cause, and the save may find what the ledger does not
                    self.ledger.write("stopping", cause=cause.lower(), step=step)
            return Cause[self.world.broadcast_text(cause)]

    def go_on(self) -> None:
        """The stop is off; one that came since stays."""
        self.signals.forget_stop(self._stops)

    def leave(self, cause: Cause, stop: str) -> None:
        """Everything is saved: put the job back into the queue where the cause wants that. Rank 0 alone calls Slurm."""
        with self.signals.busy():
            self.world.barrier()
            # Slurm may end this process together with its answer; `after` asks Slurm too, and needs no line of ours.
            if self.world.first and cause.requeues and self._requeue(stop):
                with suppress(OSError):
                    self.ledger.write("requeued", by="rank-0000")
            self.world.barrier()  # the others wait in here for rank 0, where no watchdog takes them for hung

    def _requeue(self, stop: str) -> bool:
        """Asks for the cause once more: a requeue would bring back a job that was cancelled during the save.

        Where Slurm does not answer, the requeue is left to ``after``.
        """
        still = why_signalled(self.environ, stop, self.lead, ASK_SECONDS)
        return still.requeues and requeue(self.environ, REQUEUE_SECONDS)
