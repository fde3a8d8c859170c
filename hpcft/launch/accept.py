"""The first helper of the batch script: the Plan from the script into the run folder, and the run into our hands.

Exit code 0: go on; 3: the run is finished already; 2: refused (another plan is there, or a live job holds the run).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.errors import refuse
from hpcft.launch.entry import run, say
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import STORE_VARIABLE, RunPaths

EXIT_GO_ON = 0
EXIT_FINISHED = 3

# What may differ when an unfinished run is submitted again: how it is started, not what it computes.
MAY_CHANGE = frozenset({"hpcft", "resources", "budgets", "environment"})


def accept(text: str, paths: RunPaths, environ: Mapping[str, str]) -> int:
    """Take up the plan ``text`` for the run at ``paths``; the exit code. Raises Refusal, see the module."""
    plan = Plan.from_json(text, where="the plan in the script")
    make_folder(paths.root)
    if paths.plan.exists():
        refuse_other_plan(plan, Plan.from_json(paths.plan.read_text(encoding="utf-8"), str(paths.plan)), paths)
    if is_finished(paths):
        say(f"run {plan.name} is finished: {paths.root}")
        return EXIT_FINISHED
    lease.take(paths, environ, plan.fingerprint)
    keep_plan(text, paths)
    Ledger(paths, "batch", environ).write("accepted", plan=plan.fingerprint, store=environ.get(STORE_VARIABLE))
    return EXIT_GO_ON


def is_finished(paths: RunPaths) -> bool:
    return any(event["event"] == "finished" for event in read_events(paths))


def make_folder(root: Path) -> None:
    """The run folder, for its owner alone. Raises Refusal where it cannot be made or belongs to somebody else."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise refuse(f"the run folder cannot be made: {error.strerror}", where=str(root)) from error
    if owner != os.getuid():
        raise refuse(f"the run folder belongs to another user (uid {owner})", where=str(root))


def refuse_other_plan(new: Plan, old: Plan, paths: RunPaths) -> None:
    """Raises Refusal, naming every key, where the two plans would not compute the same thing."""
    keys = [key for key in differing(new, old) if key.split(".")[0] not in MAY_CHANGE]
    if keys:
        raise refuse(
            f"the run folder holds another plan: {', '.join(keys)} differ",
            where=str(paths.plan),
            value=f"plan {new.fingerprint} in the script, {old.fingerprint} in the folder",
            hint="give this run a name of its own, or remove the folder if its results are not wanted",
        )


def differing(new: Plan, old: Plan) -> list[str]:
    """The dotted keys in which two plans differ, in the order of the Plan."""
    return list(_differing(dataclasses.asdict(new), dataclasses.asdict(old), ""))


def _differing(new: Any, old: Any, key: str) -> Iterator[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        for name in new | old:
            yield from _differing(new.get(name), old.get(name), f"{key}.{name}" if key else name)
    elif new != old:
        yield key


def keep_plan(text: str, paths: RunPaths) -> None:
    """``plan.json`` becomes ``text``; the one it replaces is kept under plans/."""
    if paths.plan.exists():
        if paths.plan.read_text(encoding="utf-8") == text:
            return
        paths.plans.mkdir(mode=0o700, exist_ok=True)
        number = 1 + max((int(path.stem) for path in paths.plans.glob("[0-9]*.json")), default=0)
        disk.replace(paths.plans / f"{number:03d}.json", paths.plan.read_text(encoding="utf-8"))
    disk.replace(paths.plan, text)


def main() -> int:
    text = sys.stdin.buffer.read().decode("utf-8")
    return accept(text, RunPaths.from_environment(), os.environ)


if __name__ == "__main__":
    sys.exit(run(main))
