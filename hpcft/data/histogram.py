"""A picture of how long the records of prepared data are, beside the shards: tokens.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.shards import Windows

NAME = "tokens.png"
BINS = 48
ALL, TRAINED, LIMIT = "#9ecae1", "#d95f02", "#444444"


def drawn(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Draw what is not drawn yet; one line that says where the picture is, or why there is none."""
    path = folder / NAME
    if path.is_file():
        return f"histogram of the lengths: {path}"
    try:
        draw(path, folder, manifest)
    except ImportError:
        return "no histogram of the lengths: pip install matplotlib"
    except OSError as error:  # a store of somebody else's, a full disk: the data is good all the same
        return f"no histogram of the lengths: {error}"
    return f"histogram of the lengths: {path}"


def draw(path: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """A panel for each split: records by their tokens, all and trained, on a logarithmic axis up to the limit."""
    from matplotlib.figure import Figure

    splits = manifest["splits"]
    limit = max(facts["max_length"] for facts in splits.values())
    figure = Figure(figsize=(8, 1 + 3 * len(splits)), dpi=110, layout="constrained")
    figure.suptitle(_title(manifest), fontsize=11)
    panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False)[:, 0]
    lengths = {split: Windows(folder, split, facts).records() for split, facts in splits.items()}
    counted = 1 if manifest["classes"]["names"] else 2  # of a labelled text one token is trained
    low = max(1, min(int(n.min(initial=limit)) for both in lengths.values() for n in both[:counted]))
    edges = np.unique(np.geomspace(low, max(limit, low + 1), BINS + 1).round())
    for panel, (split, both) in zip(panels, lengths.items(), strict=True):
        _panel(panel, split, both[:counted], edges)
    panels[-1].set_xlabel("tokens of a record (logarithmic)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _title(manifest: Mapping[str, Any]) -> str:
    rows = manifest["audit"]["rows"]
    changed = {"dropped, too long": rows["too_long"], "dropped, nothing to train on": rows["untrained"],
               "truncated": rows["truncated"], "split": rows["split"]}  # fmt: skip
    parts = [f"{count:,} {what}" for what, count in changed.items() if count]
    return " · ".join([f"{rows['kept']:,} of {rows['read']:,} rows kept", *parts])


def _panel(panel: Any, split: str, lengths: Sequence[NDArray[np.int64]], edges: NDArray[np.float64]) -> None:
    """lengths: all tokens of each record, and the trained ones where there are several."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    limit, highest = int(edges[-1]), 1
    for numbers, colour, name in zip(lengths, (ALL, TRAINED), ("all tokens", "trained tokens"), strict=False):
        counts, _ = np.histogram(numbers, edges)
        highest = max(highest, int(counts.max()))
        mean = float(numbers.mean()) if len(numbers) else 0.0
        label = f"{name}: {numbers.sum():,}, {mean:,.0f} in the mean"
        panel.stairs(counts, edges, fill=name == "all tokens", color=colour, linewidth=1.8, label=label)
    panel.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"max_length: {limit:,} tokens")
    panel.set_xscale("log", base=2)
    panel.set_xlim(edges[0] * 0.9, limit * 1.1)
    panel.set_ylim(0, highest * 1.4)  # room for the legend
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else ""))
    panel.set_ylabel("records")
    panel.set_title(f"{split}: {len(lengths[0]):,} records", fontsize=10)
    panel.legend(fontsize=8, loc="upper left")
    panel.grid(axis="y", alpha=0.3)
