"""The folder of a run taken up: made for its owner alone, its plan read, compared with another, kept."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hpcft import disk
from hpcft.errors import near, refuse
from hpcft.plan.difference import differing
from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths

# What may differ when an unfinished run is submitted again: how it is started and spread, not what it computes.
MAY_CHANGE = frozenset(
    {"hpcft", "resources", "budgets", "environment", "layout", "memory", "batch.micro_windows", "batch.accumulation",
     "train.strategy", "train.strategy_module", "train.deepspeed", "train.recomputation", "train.resharding",
     "train.compiled", "train.loss_chunk"}
)  # fmt: skip


def read_plan(paths: RunPaths) -> Plan:
    """The plan of a run; of one that waits, or that ended while it did, the one that was handed over.

    Raises Refusal where there is none, naming the runs beside it, or where it cannot be read.
    """
    file = paths.handed_over if paths.handed_over.exists() and not paths.plan.exists() else paths.plan
    try:
        return Plan.from_json(disk.read(file), where=str(file))
    except OSError as error:
        if paths.root.is_dir():
            raise refuse(f"the run has no plan: {error.strerror}", where=str(paths.plan)) from error
        known = sorted(path.parent.name for path in paths.root.parent.glob("[!.]*/plan.json"))
        guess = near(paths.root.name, known)
        hint = f"did you mean {paths.root.parent / guess}?" if guess else "a run's folder holds plan.json"
        raise refuse("no such run", value=paths.root, choices=known[:12], hint=hint) from error


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run: begun, or handed over and waiting. One that is closed to us is not."""
    paths = RunPaths(folder)
    try:
        return any(file.is_file() for file in (paths.plan, paths.script, paths.handed_over))
    except OSError:
        return False


def is_closed(folder: Path) -> bool:
    """Whether ``folder`` is there and may not be looked into, as another person's run."""
    try:
        return folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)
    except PermissionError:  # the folder around it is
        return True
    except OSError:
        return False


def make_folder(root: Path) -> None:
    """The run folder, for its owner alone. Raises Refusal where it cannot be made or belongs to somebody else."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise refuse(f"the run folder cannot be made: {error.strerror}", where=str(root)) from error
    if owner != os.getuid():
        raise refuse(f"the run folder belongs to another user (uid {owner})", where=str(root))


def unmake(paths: RunPaths) -> None:
    """Nothing was submitted: take away what a submission makes of a new folder, but what else has come to it."""
    with suppress(OSError):
        for file in (paths.script, paths.prepare_script, paths.handed_over):
            file.unlink(missing_ok=True)
        for folder in (paths.prepare_jobs, paths.jobs, paths.root):
            if folder.exists():
                folder.rmdir()


def refuse_other_plan(new: Plan, paths: RunPaths) -> None:
    """Raises Refusal, naming every key, where the plan in the folder would not compute the same as ``new``."""
    if not paths.plan.exists():
        return
    old = read_plan(paths)
    keys = [key for key in differing(new, old) if not {key, key.split(".")[0]} & MAY_CHANGE]
    if keys:
        raise refuse(
            f"the run folder holds another plan: {', '.join(keys)} differ",
            where=str(paths.plan),
            value=f"plan {new.fingerprint} in the script, {old.fingerprint} in the folder",
            hint="give this run a name of its own, or remove the folder if its results are not wanted",
        )


def keep_plan(text: str, paths: RunPaths) -> None:
    """``plan.json`` becomes ``text``; the one it replaces is kept under plans/."""
    if paths.plan.exists():
        if paths.plan.read_text(encoding="utf-8") == text:
            return
        paths.plans.mkdir(mode=0o700, exist_ok=True)
        number = 1 + max((int(path.stem) for path in paths.plans.glob("[0-9]*.json")), default=0)
        disk.replace(paths.plans / f"{number:03d}.json", paths.plan.read_text(encoding="utf-8"))
    disk.replace(paths.plan, text)
