"""What prepared data says of itself: the manifest of a data request, read without opening the shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.plan.plan import DataPlan, Plan, data_key


@dataclass(frozen=True)
class PreparedFacts:
    """Counts of prepared data; tokens and trained_tokens are those of the training split."""

    content: str
    windows: int
    validation_windows: int
    tokens: int
    trained_tokens: int


def prepared_facts(store: Path, data: DataPlan) -> PreparedFacts | None:
    """The counts of ``data`` in ``store``; None where it is not prepared (or a file of it cannot be read)."""
    try:
        content = json.loads((store / "requests" / f"{data_key(data)}.json").read_text())["content"]
        splits: Mapping[str, Any] = json.loads((store / content / "manifest.json").read_text())["splits"]
        train = splits["train"]
        return PreparedFacts(
            content,
            train["windows"],
            splits.get("validation", {}).get("windows", 0),
            train["tokens"],
            train["trained_tokens"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def steps_per_epoch(plan: Plan, windows: int) -> int:
    """Optimizer steps that one pass over ``windows`` takes; the last one may be smaller."""
    return -(-windows // plan.batch.global_windows)


def total_steps(plan: Plan, windows: int) -> int:
    """Optimizer steps of the whole run: max_steps where it is set, else epochs × steps per epoch, rounded up."""
    if plan.optim.max_steps > 0:
        return plan.optim.max_steps
    exact = steps_per_epoch(plan, windows) * plan.optim.num_train_epochs
    return max(1, int(exact) + (exact > int(exact)))
