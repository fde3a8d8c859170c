"""The loss curve of a run as a picture, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAIN, EVALUATED, GRID = "#9db7d5", "#c2410c", "#e5e5e5"


def draw(metrics: Path, picture: Path, title: str) -> tuple[float, float]:
    """Write ``picture`` (PNG); the last training loss and the last evaluation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, evaluated = points(metrics, "loss"), points(metrics, "eval_loss")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*train, strict=True), color=TRAIN, label=f"training, {train[-1][1]:.3f} at the end")
    axes.plot(*zip(*evaluated, strict=True), color=EVALUATED, marker="o", markersize=3.5,
              label=f"held-out questions, {evaluated[-1][1]:.3f} at the end")  # fmt: skip
    axes.set(yscale="log", xlabel="optimizer step", ylabel="loss per answer token (nats, log scale)", xlim=(0, None))
    axes.set_title(title, loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return train[-1][1], evaluated[-1][1]


def points(metrics: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line of metrics that has ``key``. A run that was resumed shows each step once."""
    from hpcft.train.metrics import read_metrics

    lines: list[dict[str, Any]] = read_metrics(metrics)
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]
