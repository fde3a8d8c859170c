"""The same losses and gradient norms from every strategy: ``make equivalence`` writes the table of the docs.

python -m tests.train.equivalence [FAMILY …]    three optimizer steps, float32 on CPUs, uneven masks, accumulation 2
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed  # imported once here, not in every forked rank

from hpcft.plan.plan import Plan
from hpcft.train import equivalence, world
from hpcft.train.equivalence import TOLERANCES, Curve, curve, difference, windows_in_all
from tests.train import families, small

DOC = Path(__file__).parents[2] / "docs" / "concepts" / "one-loss.md"
TOLERANCE = TOLERANCES["cpu", "float32"]


@dataclass(frozen=True)
class Row:
    """One strategy against one process. difference: the largest relative one of losses and norms."""

    family: str
    kind: str
    layout: str
    difference: float


def train(plan: Plan, root: Path, prepared: small.Prepared) -> Curve:
    """On each rank: the run from where it stands to its end; rank 0 has what its metrics hold."""
    return equivalence.train(plan, root, world.join(plan, os.environ), prepared)


def trained(plan: Plan, root: Path, prepared: small.Prepared, attempt: int = 1) -> Curve:
    """The same, from outside: on as many forked ranks as the plan has."""
    small.on_ranks(plan.layout.world_size, train, plan, root, prepared, attempt=attempt)
    return curve(root)


def rows(names: Iterable[str], kinds: Sequence[str], layouts: Iterable[str]) -> Iterator[Row]:
    """Every layout for every family and kind of tuning, the one process first."""
    folder = Path(tempfile.mkdtemp(prefix="hpcft-equivalence-"))
    prepared = small.Prepared(small.windows(windows_in_all(families.BATCH)))
    for family in names:
        model = families.save(folder / family, family)
        for kind in kinds:
            place: Callable[[str], Path] = lambda layout: folder / f"{family}-{kind}-{layout}"  # noqa: B023, E731
            alone = trained(families.plan_for(model, "one process", kind), place("one process"), prepared)
            for layout in layouts:
                here = trained(families.plan_for(model, layout, kind), place(layout), prepared)
                yield Row(family, kind, layout, difference(here, alone))


def table(found: Sequence[Row]) -> str:
    """Markdown: a line for each family and kind of tuning, a column for each layout."""
    layouts = list(dict.fromkeys(row.layout for row in found))
    lines = ["| model, tuning | " + " | ".join(layouts) + " |", "| --- |" + " --- |" * len(layouts)]
    cells = {(row.family, row.kind, row.layout): f"{row.difference:.0e}" for row in found}
    for family, kind in dict.fromkeys((row.family, row.kind) for row in found):
        lines.append(f"| {family}, {kind} | " + " | ".join(cells[family, kind, layout] for layout in layouts) + " |")
    return "\n".join(lines) + "\n"


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of ``name`` in a Markdown file."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(before + begin + text + end + after, encoding="utf-8")


def versions() -> str:
    """What the table was made with."""
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, deepspeed {deepspeed.__version__}"


def main(arguments: Sequence[str]) -> int:
    """Write the table into the docs; 1 where a strategy differs by more than the tolerance."""
    found = []
    layouts = [name for name in families.LAYOUTS if name != "one process"]
    for row in rows(arguments or families.FAMILIES, ("full", "lora"), layouts):
        found.append(row)
        print(f"{row.family:8} {row.kind:5} {row.layout:10} {row.difference:.1e}", flush=True)
    if not arguments:
        put(DOC, "equivalence", f"{table(found)}\nMade with {versions()}.\n")
    worst: Any = max(found, key=lambda row: row.difference)
    print(f"worst: {worst.difference:.1e} ({worst.family}, {worst.kind}, {worst.layout})")
    return int(worst.difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
