"""Where a run stands: the few numbers that, with the weights, make the next step what it would have been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """Counted from the start of the run, over all attempts and ranks.

    step: optimizer steps done. consumed: windows; it alone fixes the position in the data. evaluated: the step of the
    last evaluation; best_loss, best_step: of the best one; worse: evaluations since. interval_*: sums since the last
    line of metrics, so that a line is the same whether a stop fell into its interval or not.
    """

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    evaluated: int = 0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    interval_loss: float = 0.0
    interval_units: int = 0
    interval_metrics: dict[str, list[float]] = field(default_factory=dict)

    def advance(self, windows: int, tokens: int, trained: int) -> None:
        """One optimizer step is done, or was skipped."""
        self.step += 1
        self.consumed += windows
        self.tokens += tokens
        self.trained_tokens += trained

    def judge(self, loss: float) -> bool:
        """Take note of an evaluation; True when it is the best so far."""
        self.evaluated = self.step
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.worse = loss, self.step, 0
            return True
        self.worse += 1
        return False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Progress:
        known = {f.name for f in fields(cls)}
        data = {"interval_units": data.get("interval_trained", 0), **data}  # its name in older checkpoints
        return cls(**{name: value for name, value in data.items() if name in known})
