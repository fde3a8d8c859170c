"""What a run reads and writes on this machine: is it there, and may this process touch it? Seconds, no torch.

Asked before anything is prepared or queued. A file that is there and may not be read is not called missing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcft.catalog import DATA_FILES
from hpcft.errors import Problem, near_file
from hpcft.plan.basefiles import unusable
from hpcft.plan.hubfiles import MODEL
from hpcft.plan.plan import Plan
from hpcft.run.expand import run_folder
from hpcft.run.manifest import FILE
from hpcft.run.paths import RunPaths

RIGHTS = "ls -ld shows its rights and whose it is"


def missing_inputs(plan: Plan, origins: Mapping[str, str], ranks: bool) -> list[Problem]:
    """Every local model or data file of the run that is not there, may not be read, or cannot be trained.

    origins: leaf → the line it is on; empty where only the Plan is left of the run's file. ranks: also what they read,
    the model's weights and the checkpoint to begin with.
    """
    problems = []
    if plan.model.source == "local":
        found = model_problems(plan, Path(plan.model.path).expanduser(), ranks)
        problems += [dataclasses.replace(problem, where=origins.get("model", "")) for problem in found]
    for leaf, sources in (("dataset", plan.data.train), ("val_dataset", plan.data.validation)):
        for source in sources:
            if source.source == "local":
                problems += _data_file(leaf, source.path, origins.get(leaf, ""))
    return [*problems, *(_resumed(plan, origins.get("resume_from_checkpoint", "")) if ranks else ())]


def _resumed(plan: Plan, where: str) -> Iterator[Problem]:
    """The checkpoint that a run is to begin with; a run that has checkpoints of its own goes on at those."""
    wanted = plan.checkpoint.resume
    if wanted in ("auto", "none") or any(RunPaths(run_folder(plan)).checkpoints.glob("step-*")):
        return
    if why := denied(Path(wanted)):
        yield dataclasses.replace(may_not("resume_from_checkpoint", wanted, why), where=where)
    elif not (Path(wanted) / FILE).is_file():
        hint = "a folder such as runs/NAME/checkpoints/step-000400; auto: the newest of this run; none: start anew"
        yield Problem(f"resume_from_checkpoint: no checkpoint is there (no {FILE})", where, wanted, hint=hint)


def denied(path: Path, write: bool = False) -> str:
    """What keeps this process from ``path``: the first folder above it, or itself; "" where nothing does.

    A path that is not there is kept from being written by the folder that it would be made in.
    """
    for step in [*reversed(path.absolute().parents), path.absolute()]:
        try:
            os.stat(step)
        except PermissionError:
            return str(step.parent)
        except OSError:  # not there: it would be made in the folder above
            return "" if not write or os.access(step.parent, os.W_OK | os.X_OK) else str(step.parent)
        if os.path.isdir(step) and not os.access(step, os.X_OK):
            return str(step)
    return "" if os.access(path, os.W_OK if write else os.R_OK) else str(path)


def model_problems(plan: Plan, folder: Path, weights: bool) -> Iterator[Problem]:
    """What is wrong with the model in ``folder``, its rights first. weights: look at them too."""
    if why := denied(folder) or denied(folder / "config.json"):
        yield may_not("model", plan.model.path, why)
    elif not (folder / "config.json").is_file():
        hint = "a folder with config.json, or a name on a hub such as Qwen/Qwen2.5-0.5B-Instruct"
        yield Problem("model: no model is there", value=plan.model.path, hint=hint)
    else:
        for file in sorted({file for pattern in MODEL for file in folder.glob(pattern)}):
            if why := denied(file):
                yield may_not("model", str(file), why)
        if weights:
            yield from unusable(folder, plan)


def _data_file(leaf: str, name: str, where: str) -> Iterator[Problem]:
    path = Path(name).expanduser()
    if why := denied(path):
        yield dataclasses.replace(may_not(leaf, name, why), where=where)
    elif not path.exists():
        yield no_such_file(leaf, name, where, DATA_FILES)


def no_such_file(leaf: str, name: str, where: str, kinds: tuple[str, ...]) -> Problem:
    """The complaint about a file that is not there, with the one most like it. kinds: endings that may be offered."""
    folder = Path(name).expanduser().parent
    there = [path.name for path in folder.iterdir() if _is_a(path, kinds)] if os.path.isdir(folder) else []
    guess = near_file(Path(name).name, there)
    hint = f"did you mean {folder / guess}?" if guess else "paths are relative to the folder you call hpcft in"
    return Problem(f"{leaf}: no such file", where, name, hint=hint)


def may_not(leaf: str, name: str, why: str) -> Problem:
    """The complaint about a file that is kept from us by ``why``, itself or a folder above it."""
    return Problem(f"{leaf}: may not be read: permission denied by {why}", value=name, hint=RIGHTS)


def _is_a(path: Path, kinds: tuple[str, ...]) -> bool:
    return os.path.isfile(path) and path.name.removesuffix(".gz").endswith(kinds)


def unwritable_store(store: Path) -> Problem | None:
    """The complaint about a store of prepared data that this process may not write."""
    for folder in (store, *(store / name for name in ("locks", "requests", "work"))):
        if why := denied(folder, write=True):
            return Problem(
                f"the data cannot be prepared: {why} may not be written",
                value=str(store),
                hint="store: in the cluster profile, a folder of your own; or ask for the rights of that one",
            )
    return None
