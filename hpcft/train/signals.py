"""Signals set a flag and nothing else; the ranks agree on it at the next step edge. No torch here: this module is
imported and installed first, so that a signal during the slow imports kills no rank.

TERM and USR2 ask to stop, USR1 asks to save. A watchdog thread covers the case where no step edge comes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType

STOPS = {signal.SIGUSR2: "USR2", signal.SIGTERM: "TERM"}
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
        self._asked_at: float | None = None
        self._watch: threading.Thread | None = None

    def install(self) -> None:
        """Take over TERM, USR2 and USR1. Only the main thread may call it."""
        for number in STOPS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self.stop is None:
            self.stop = STOPS[signal.Signals(number)]
            self._asked_at = time.monotonic()

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
        if self._asked_at is not None:
            self._asked_at = time.monotonic()

    def forget_stop(self, stops: int) -> None:
        """Training goes on after all; a stop that came after the first ``stops`` ones stays asked for."""
        if self._stops == stops:
            self.stop, self._asked_at = None, None

    def watch(self, grace: float) -> None:
        """End this process when a stop was asked for and nothing has moved for ``grace`` seconds.

        The stacks of all threads go to stderr first, so that the log says where it hung.
        """
        self._watch = threading.Thread(target=self._guard, args=(grace,), name="stop-watchdog", daemon=True)
        self._watch.start()

    def _guard(self, grace: float) -> None:
        while True:
            time.sleep(min(1.0, grace / 4))
            asked_at = self._asked_at
            if asked_at is not None and time.monotonic() - asked_at > grace:
                print(
                    f"asked to stop ({self.stop}), but no step edge came in {grace:.0f} s; where it hangs:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HUNG)


SIGNALS = Signals()
