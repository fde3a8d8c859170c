"""What rank 0 shows: a progress bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

EVERY = 5.0  # seconds between plain lines


# Of an objective's metrics: name → word.
SHOWN = {"accuracy": "accuracy", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "kl"}


def told_of(line: Mapping[str, Any], prefix: str = "") -> str:
    """What of an objective's own metrics a person watches: ``  accuracy 0.812  margin 1.320``.

    A margin has no value in a step whose rated answers are all good or all bad.
    """
    numbers = [(word, line.get(prefix + name, math.nan)) for name, word in SHOWN.items()]
    return "".join(f"  {word} {number:.3f}" for word, number in numbers if not math.isnan(number))


class Console:
    """Silent on every rank but the first."""

    def __init__(self, speaks: bool, step: int, total: int, stream: TextIO = sys.stderr) -> None:
        self.speaks, self.total, self.stream = speaks, total, stream
        self._said_at = float("-inf")
        self._bar: Any = None
        if speaks and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", file=stream, dynamic_ncols=True)

    def step(self, line: dict[str, Any]) -> None:
        """Show a line of metrics; where there is no terminal at most every few seconds, and the last one always."""
        if not self.speaks:
            return
        loss = f"{line['loss']:.4f}" if line.get("loss") is not None else "not finite"
        text = f"loss {loss}{told_of(line)}  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(line["step"] - self._bar.n)
        elif time.monotonic() - self._said_at >= EVERY or line["step"] == self.total:
            self._said_at = time.monotonic()
            self.say(f"step {line['step']}/{self.total}  epoch {line['epoch']:.2f}  {text}")

    def say(self, text: str) -> None:
        """One line of its own; lost where the log lies on a disk that is full, which must not end the run here."""
        if not self.speaks:
            return
        with suppress(OSError):
            if self._bar is not None:
                self._bar.write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
