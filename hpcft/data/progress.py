"""Progress on stderr: a bar in a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

EVERY = 5.0  # seconds between two lines


def tell(sentence: str) -> None:
    """One line to the person, on stderr: stdout is for data. A log on a full disk is no reason to prepare nothing."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


class Progress:
    """Rows counted as they are done: a bar in a terminal, a line every few seconds in a log. In a ``with`` block."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done, self.counted = what, total, 0, 0
        self.start = self.last = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=self.what, total=self.total, unit=" rows", leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, rows: int, made: bool = True) -> None:
        """So many more. made: by us now; what was found from before says nothing of the speed."""
        self.done += rows
        self.counted += rows if made else 0
        if self.bar is not None:
            self.bar.update(rows)
        elif (now := time.monotonic()) - self.last > EVERY:
            self.last, speed = now, max(self.counted, 1) / (now - self.start)
            left = f" of {self.total:,}, about {(self.total - self.done) / speed:.0f} s left" if self.total else ""
            tell(f"{self.what}: {self.done:,} rows{left} ({speed:,.0f} rows/s)")
