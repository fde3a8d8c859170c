"""Saved under one strategy, resumed under another, on another number of ranks: ``make resume-matrix`` writes the table.

python -m tests.train.resume_matrix [--quick]    four optimizer steps; the checkpoint after the second is resumed
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.plan.plan import Plan
from tests.train import families, small
from tests.train.equivalence import DOC, TOLERANCE, Curve, difference, put, trained, versions

FAMILY = "qwen3"
EVERY = (1, 2, 3, 4)
# name → strategy, and for each number of ranks that it is tried on its axes
LAYOUTS: dict[str, tuple[str, dict[int, dict[str, int]]]] = {
    "one process": ("ddp", {1: {"dp": 1}}),
    "DDP": ("ddp", {n: {"dp": n} for n in EVERY[1:]}),
    "ZeRO-1": ("zero1", {n: {"dp": n} for n in EVERY}),
    "ZeRO-2": ("zero2", {n: {"dp": n} for n in EVERY}),
    "ZeRO-3": ("zero3", {n: {"dp": n} for n in EVERY}),
    "FSDP2": ("fsdp", {n: {"dp": n} for n in EVERY}),
    "HSDP": ("fsdp", {4: {"dp_replicate": 2, "dp": 2}}),
    "TP": ("ddp", {n: {"dp": 1, "tp": n} for n in (2, 4)}),
    "FSDP2×TP": ("fsdp", {4: {"dp": 2, "tp": 2}}),
    "DDP×TP": ("ddp", {4: {"dp": 2, "tp": 2}}),
}
SHARDED = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "TP")  # full tuning is tried among these, and on the diagonal
WINDOWS = 12  # of a step: as many ranks as are tried divide it


@dataclass(frozen=True)
class Cell:
    """kind: full or lora. difference: the largest relative one of the two losses and norms after the resume."""

    kind: str
    saved: str
    resumed: str
    ranks: tuple[int, int]
    difference: float


def plan_for(model: Path, layout: str, ranks: int, kind: str, dropout: float) -> Plan:
    """Four steps, a checkpoint after every second."""
    strategy, degrees = LAYOUTS[layout]
    axes = degrees[ranks]
    per_rank = WINDOWS // (axes["dp"] * axes.get("dp_replicate", 1))
    changes: dict[str, Any] = {
        "tuner": {"dropout": dropout},
        "batch": {"global_windows": WINDOWS, "micro_windows": 2 if per_rank % 2 == 0 else 1},
        "optim": {"max_steps": 4},
        "checkpoint": {"save_steps": 2},
    }
    return families.plan_with(model, strategy, axes, kind, **changes)


class Matrix:
    """What was saved, each state once; and the cells that are filled from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        self.model = families.save(folder / "model", FAMILY)
        self.prepared = small.Prepared(small.windows(30))
        self.states: dict[tuple[str, int, str, float], tuple[Path, Curve]] = {}

    def state(self, layout: str, ranks: int, kind: str, dropout: float) -> tuple[Path, Curve]:
        """The checkpoint after two steps of an undisturbed run, and the run's four steps."""
        key = (layout, ranks, kind, dropout)
        if key not in self.states:
            root = self.folder / f"saved-{next(self.numbers)}"
            curve = trained(plan_for(self.model, layout, ranks, kind, dropout), root, self.prepared)
            self.states[key] = (root / "checkpoints" / "step-000002", curve)
        return self.states[key]

    def cell(self, kind: str, saved: str, resumed: str, ranks: tuple[int, int]) -> Cell:
        """Two more steps under the other strategy, against the run that was not disturbed.

        On the diagonal with dropout, against the strategy's own run; elsewhere without, against one process.
        """
        dropout = 0.1 if saved == resumed and ranks[0] == ranks[1] and kind == "lora" else 0.0
        checkpoint, own = self.state(saved, ranks[0], kind, dropout)
        expected = own if dropout else self.state("one process", 1, kind, 0.0)[1]
        root = self.folder / f"resumed-{next(self.numbers)}"
        shutil.copytree(checkpoint, root / "checkpoints" / checkpoint.name)
        after = trained(plan_for(self.model, resumed, ranks[1], kind, dropout), root, self.prepared, attempt=2)
        shutil.rmtree(root)
        return Cell(kind, saved, resumed, ranks, difference(after, expected[2:]))


def pairs(kind: str) -> Iterator[tuple[str, str]]:
    """Every ordered pair for LoRA; for full tuning the diagonal and what shards the model."""
    for saved, resumed in itertools.product(LAYOUTS, LAYOUTS):
        if kind == "lora" or saved == resumed or (saved in SHARDED and resumed in SHARDED):
            yield saved, resumed


def ranks_of(saved: str, resumed: str, turn: int) -> tuple[int, int]:
    """How many ranks save and resume: the same on the diagonal; else different ones where both allow it."""
    first, second = list(LAYOUTS[saved][1]), list(LAYOUTS[resumed][1])
    if saved == resumed:
        return first[-1], first[-1]
    before = first[-1 - turn % min(2, len(first))]
    other = [n for n in second if n != before] or second
    return before, other[turn % len(other)]


def table(cells: Sequence[Cell], kind: str) -> str:
    """Markdown: saved under the row, resumed under the column; ranks, and the largest relative difference."""
    found = {(cell.saved, cell.resumed): cell for cell in cells if cell.kind == kind}
    lines = ["| saved ↓ resumed → | " + " | ".join(LAYOUTS) + " |", "| --- |" + " --- |" * len(LAYOUTS)]
    for saved in LAYOUTS:
        row = [found.get((saved, resumed)) for resumed in LAYOUTS]
        shown = [f"{c.ranks[0]}→{c.ranks[1]}: {c.difference:.0e}" if c else "" for c in row]
        lines.append(f"| {saved} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the docs; 1 where a cell differs by more than the tolerance."""
    began, cells = time.monotonic(), []
    matrix = Matrix(Path(tempfile.mkdtemp(prefix="hpcft-resume-")))
    for kind in ("lora", "full"):
        for turn, (saved, resumed) in enumerate(pairs(kind)):
            cells.append(matrix.cell(kind, saved, resumed, ranks_of(saved, resumed, turn)))
            print(f"{kind:4} {saved:11} → {resumed:11} {cells[-1].ranks} {cells[-1].difference:.1e}", flush=True)
    shutil.rmtree(matrix.folder)
    minutes = (time.monotonic() - began) / 60
    names = {"lora": "LoRA", "full": "Full"}
    tables = "\n".join(f"{names[kind]}:\n\n{table(cells, kind)}" for kind in ("lora", "full"))
    put(DOC, "resume-matrix", f"{tables}\nMade with {versions()}, in {minutes:.0f} minutes.\n")
    worst = max(cells, key=lambda cell: cell.difference)
    print(f"{len(cells)} cells; worst: {worst}")
    return int(worst.difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
