"""Progress on stderr: a bar in a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between two lines


def tell(sentence: str) -> None:
    """One line to the person, on stderr: stdout is for data."""
    print(sentence, file=sys.stderr, flush=True)


def shown(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """``items`` as they are, with progress shown while they are consumed."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=" rows", leave=False)
        return
    start = last = 0.0
    for done, item in enumerate(items):
        if not done:  # what came before the first item was starting up, and says nothing of the speed
            start = last = time.monotonic()
        yield item
        if (now := time.monotonic()) - last > EVERY:
            last, speed = now, done / (now - start)
            left = f" of {total:,}, about {(total - done) / speed:.0f} s left" if total else ""
            tell(f"{what}: {done:,} rows{left} ({speed:,.0f} rows/s)")
