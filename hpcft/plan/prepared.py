"""What prepared data says of itself: the manifest of a data request, read without opening the shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.plan.plan import DataPlan, data_key


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
