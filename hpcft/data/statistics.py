"""How long the records of prepared data are: the numbers of the audit's table and of its picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.shards import Windows

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def measured(folder: Path, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Of every split: how many records its windows hold, and of a record's tokens, all and trained, how they spread.

    folder: with the shards; splits: their facts. A pair is one record, one that is repeated counts each time.
    """
    return {split: _split(*Windows(folder, split, facts).records()) for split, facts in splits.items()}


def _split(tokens: NDArray[np.int64], trained: NDArray[np.int64]) -> dict[str, Any]:
    return {"records": len(tokens), "tokens": spread(tokens), "trained": spread(trained)}


def spread(numbers: NDArray[np.int64]) -> dict[str, float]:
    """Sum, mean and quantiles; each quantile is one of the numbers. All are 0 where there are none."""
    if not len(numbers):
        return dict.fromkeys(("sum", "mean", *QUANTILES), 0)
    quantiles = np.quantile(numbers, list(QUANTILES.values()), method="nearest")
    return {
        "sum": int(numbers.sum()),
        "mean": round(float(numbers.mean()), 1),
        **{name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
    }
