"""What every rank runs for ``hpcft verify``: each strategy on the ranks there are, compared with one process.

``python -m hpcft.train.verify``, in HPCFT_RUN a folder whose plan gives ranks and model. The ranks meet once. Rank 0
makes the model in miniature and trains it by itself; then all together arrange themselves to one case after the other.
What was found stands in ``verify.json`` after every case, so that one that takes the ranks down is known by name.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcft import disk
from hpcft.catalog import STRATEGIES
from hpcft.plan.plan import Plan
from hpcft.run.folder import read_plan
from hpcft.run.paths import RunPaths
from hpcft.train import equivalence, miniature, world
from hpcft.train.equivalence import ALONE, TOLERANCES, Case, Curve
from hpcft.train.main import end, explain, go_offline, lost_peer, say
from hpcft.train.model import load_config
from hpcft.train.world import World

ABSENT, DIFFERS, FAILED, OK, NOT_RUN = "absent", "differs", "failed", "ok", "not run"
PATIENCE = 120  # seconds that ranks wait for each other at most: a peer that failed alone is not coming


@dataclass
class Row:
    """One case in one compute type. difference: the largest relative one of losses and norms; note: if none, why."""

    strategy: str
    axes: str
    dtype: str
    tolerance: float
    verdict: str = NOT_RUN
    difference: float | None = None
    note: str = ""


@dataclass
class Table:
    """All that is found, and where rank 0 keeps it. family: of the model; note: why not the run's own."""

    file: Path
    family: str = ""
    note: str = ""
    device: str = ""
    kind: str = ""
    versions: str = ""
    rows: list[Row] = dataclasses.field(default_factory=list)

    def write(self) -> None:
        values = dataclasses.asdict(self)
        del values["file"]
        disk.replace(self.file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def verify(plan: Plan, paths: RunPaths, here: World) -> Table:
    """All cases in every type; rank 0's table is the whole one. Raises where the ranks lost each other."""
    torch.set_float32_matmul_precision("highest")  # TF32 has three digits; strategies that agree would look apart
    table = Table(paths.verified, device=device_name(here), kind=plan.tuner.kind, versions=versions())
    model = paths.root / "model"
    if here.first:
        table.family, table.note = miniature.of_family(lambda: load_config(plan.model), model, plan.layout.degree("tp"))
    here.barrier()
    chosen, types = own_cases(plan, model), dtypes(here)
    for dtype in types:
        tolerance = TOLERANCES[here.device.type, dtype]
        table.rows += [Row(case.name, case.axes, dtype, tolerance) for case in chosen]
    rows = iter(table.rows)
    for dtype in types:
        _one_type(plan, paths.root, here, table, [(case, next(rows)) for case in chosen], dtype)
    return table


def _one_type(plan: Plan, root: Path, here: World, table: Table, cases: list[tuple[Case, Row]], dtype: str) -> None:
    """Fill the rows of one compute type."""
    alone, problem = attempt(here, lambda: one_process(plan, root, here, dtype))
    for case, row in cases:
        if problem:
            row.verdict, row.note = FAILED, f"one process: {problem}"
        elif package := missing(case):
            row.verdict = FAILED if case.strategy == plan.train.strategy else ABSENT
            row.note = f"{package} is not installed: pip install {package}"
        else:
            row.verdict, row.note = FAILED, "the ranks lost each other; the cases after it were not run"
            _keep(table, here)  # in case the ranks do
            found, why = attempt(here, lambda: together(plan, root, here, case, dtype))  # noqa: B023
            judge(row, found, alone, why)
        _keep(table, here)


def _keep(table: Table, here: World) -> None:
    if here.first:
        table.write()


def judge(row: Row, found: Curve, alone: Curve, why: str) -> None:
    """Put into ``row`` how ``found`` compares with ``alone``, or why it cannot. Curves are rank 0's."""
    row.note = why
    if why or not alone:
        return
    row.difference = equivalence.difference(found, alone)
    row.verdict = OK if row.difference <= row.tolerance else DIFFERS


def patient(plan: Plan) -> Plan:
    """``plan`` for ranks that wait for each other no longer than a model in miniature takes."""
    seconds = min(plan.train.collective_timeout, PATIENCE)
    return dataclasses.replace(plan, train=dataclasses.replace(plan.train, collective_timeout=seconds))


def attempt(here: World, work: Callable[[], Curve]) -> tuple[Curve, str]:
    """``work()`` on this rank; and on all ranks the words of one that failed, empty where none did.

    Raises what comes of peers that cannot be asked any more.
    """
    result: Curve = []
    problem = waited = ""
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        problem = f"rank {here.rank}: {explain(error)}"
        waited = "~" * lost_peer(error)  # what it died of is known elsewhere: its words come last
    gc.collect()  # engines refer to themselves in circles, and the next one wants their memory
    problems = sorted(words for words in here.gather_text(waited + problem) if words)
    return result, problems[0].removeprefix("~") if problems else ""


def one_process(plan: Plan, root: Path, here: World, dtype: str) -> Curve:
    """The reference, on rank 0 alone; the others have none."""
    if not here.first:
        return []
    layout = ALONE.layout(1, 1)
    return _run(plan, root, World(layout.place(0), layout, here.device, 0, 1), ALONE, dtype)


def together(plan: Plan, root: Path, here: World, case: Case, dtype: str) -> Curve:
    """``case`` on all ranks, which keep their numbers, their devices and the group that they met in."""
    layout = case.layout(plan.layout.nodes, plan.layout.ranks_per_node)
    data_rank, readers = layout.data_coordinate(here.rank), layout.data_parallel
    seat = World(layout.place(here.rank), layout, here.device, data_rank, readers, here.control)
    return _run(plan, root, seat, case, dtype)


def _run(plan: Plan, root: Path, seat: World, case: Case, dtype: str) -> Curve:
    batch = equivalence.windows_of_a_step(plan.layout)
    prepared = miniature.Prepared(miniature.windows(equivalence.windows_in_all(batch)))
    small = equivalence.case_plan(plan, case, root / "model", plan.tuner.kind, seat.layout, batch)
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, dtype=dtype))
    return equivalence.train(small, root / f"{case.name} {dtype}", seat, prepared)


def own_cases(plan: Plan, model: Path) -> list[Case]:
    """All that the ranks allow, and the run's own strategy where it is not among them."""
    config: Any = load_config(dataclasses.replace(plan.model, path=str(model), source="local", revision=None))
    found = equivalence.cases(plan.layout, config.num_key_value_heads)
    degrees = {axis.name: axis.degree for axis in plan.layout.axes if axis.degree > 1 or axis.name == "dp"}
    own = Case(f"this run's {plan.train.strategy}", plan.train.strategy, degrees)
    if all((case.strategy, dict(case.degrees)) != (own.strategy, degrees) for case in found):
        found.append(own)
    return found


def missing(case: Case) -> str:
    """The package that the strategy needs and this Python does not have, or an empty string."""
    package = STRATEGIES[case.strategy].needs
    return package if package and importlib.util.find_spec(package) is None else ""


def dtypes(here: World) -> list[str]:
    """float32, and bfloat16 where the device computes in it."""
    return ["float32", "bfloat16"] if here.device.type == "cuda" and torch.cuda.is_bf16_supported() else ["float32"]


def device_name(here: World) -> str:
    return torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU"


def versions() -> str:
    """What it was found with."""
    from importlib import metadata

    found = []
    for package in ("torch", "transformers", "peft", "deepspeed"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> int:
    """0 where a table was made, whatever it says."""
    go_offline()
    paths = RunPaths.from_environment()
    plan = patient(read_plan(paths))
    here = world.join(plan, os.environ)
    verify(plan, paths, here)
    here.barrier()
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except BaseException as error:
        say(error)
    finally:
        end(code)
