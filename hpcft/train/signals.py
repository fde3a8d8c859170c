"""Signals set a flag and nothing else; the ranks agree on it at the next step edge. No torch here: this module is
imported and installed first, so that a signal during the slow imports kills no rank.

TERM and USR2 ask to stop, USR1 asks to save. A watchdog thread covers the case where no step edge comes. It hears of
signals through a pipe that C code writes to: a main thread that hangs in a collective runs no Python handler.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS: dict[int, str] = {signal.SIGUSR2: "USR2", signal.SIGTERM: "TERM"}
# By severity, so that a maximum over ranks is an agreement.
CODES = {None: 0, "USR2": 1, "TERM": 2}
NAMES = {code: name for name, code in CODES.items()}
EXIT_HUNG = 70


class Signals:
    """What was asked of this process. ``stop``: the first stop signal's name, which a second one does not change."""

    def __init__(self) -> None:
        self.stop: str | None = None
        self.save = False
        self._stops = 0
        self._last: str | None = None
        self._heard: str | None = None  # what the watchdog's clock runs for
        self._moved_at = 0.0
        self._busy = 0

    def install(self) -> None:
        """Take over TERM, USR2 and USR1. Only the main thread may call it."""
        self._woken, waking = os.pipe()
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        self._last = STOPS[number]
        if self.stop is None:
            self.stop = self._last

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    @property
    def code(self) -> int:
        """The stop flag as a number whose maximum over ranks is the ranks' agreement."""
        return CODES[self.stop]

    @property
    def stops(self) -> int:
        """How many stop signals have come."""
        return self._stops

    def edge(self) -> None:
        """A step edge: the process moves, so the watchdog's clock starts again."""
        self._moved_at = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Work that may take its time (a save, a talk with Slurm): the watchdog waits, its clock starts again after it.

        What hangs in there is ended by the timeout of the ranks' exchanges.
        """
        self._busy += 1
        try:
            yield
        finally:
            self.edge()
            self._busy -= 1

    def forget_stop(self, stops: int) -> None:
        """Training goes on after all; a stop that came after the first ``stops`` ones stays asked for."""
        if self._stops == stops:
            self.stop, self._heard = None, None
            if self._stops != stops:  # one came between the look and the forgetting
                self.stop = self._heard = self._last

    def watch(self, grace: float, warned: float | None = None) -> None:
        """End this process when a stop was asked for and nothing has moved for ``grace`` seconds.

        The stacks of all threads go to stderr first, so that the log says where it hung. warned: the seconds after
        USR2, where Slurm's own end is known.
        """
        graces = {"TERM": grace, "USR2": grace if warned is None else warned}
        threading.Thread(target=self._guard, args=(graces,), name="stop-watchdog", daemon=True).start()

    def _guard(self, graces: dict[str, float]) -> None:
        look_every = min(1.0, *(grace / 4 for grace in graces.values()))
        while True:
            self._listen(look_every)
            heard = self._heard
            if heard and not self._busy and time.monotonic() - self._moved_at > graces[heard]:
                _end_hung(heard, graces[heard])

    def _listen(self, seconds: float) -> None:
        """Wait for signals; the first one that asks to stop starts the clock."""
        if not select.select([self._woken], [], [], seconds)[0]:
            return
        stops = [STOPS[number] for number in os.read(self._woken, 4096) if number in STOPS]
        if stops and self._heard is None:
            self.edge()
            self._heard = stops[0]


def _end_hung(stop: str, grace: float) -> None:
    print(f"asked to stop ({stop}), but no step edge came in {grace:.0f} s; where it hangs:", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_HUNG)


SIGNALS = Signals()
