"""``hpcft resume``: go on with a run that has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hpcft.cli.common import find_run, refuse_missing_files

if TYPE_CHECKING:
    from hpcft.plan.plan import Plan
    from hpcft.run.paths import RunPaths


@click.command("resume")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """Start RUN, a name or a folder, again from its newest verified checkpoint, with the plan it has.

    Budgets start anew: a person has looked. A run that is alive, or finished, is refused.
    """
    from hpcft.cli.submit import goes_to_slurm, hand_over, report
    from hpcft.run.folder import read_plan

    paths = find_run(run)
    plan = read_plan(paths)
    on_slurm = goes_to_slurm(plan)
    refuse_elsewhere(plan, paths, on_slurm)
    submitted = hand_over(plan, on_slurm, paths.root)
    report(submitted, plan)


def refuse_elsewhere(plan: Plan, paths: RunPaths, on_slurm: bool) -> None:
    """Raises Refusal where the run's data or model is not to be found from this folder: the job would look from here,
    and only say so after the queue.
    """
    from dataclasses import replace

    from hpcft.errors import Refusal

    try:
        _look(plan, paths, on_slurm)
    except Refusal as refusal:
        here = "the run's relative paths start at the folder that it was submitted from: call this there"
        hints = [f"{here}; or: {problem.hint}" if problem.hint else here for problem in refusal.problems]
        raise Refusal([replace(p, hint=hint) for p, hint in zip(refusal.problems, hints, strict=True)]) from refusal


def _look(plan: Plan, paths: RunPaths, on_slurm: bool) -> None:
    """Raises Refusal without prepared data and model or, where the job prepares, without what it would prepare from."""
    from hpcft.errors import Refusal
    from hpcft.launch.preflight import refuse_unprepared
    from hpcft.run.expand import store_folder
    from hpcft.run.paths import RUN_VARIABLE, STORE_VARIABLE

    try:
        refuse_unprepared(plan, {STORE_VARIABLE: str(store_folder(plan)), RUN_VARIABLE: str(paths.root)})
    except Refusal:
        if not (on_slurm and plan.resources.prepare in ("in_job", "job")):
            raise
        refuse_missing_files(plan, {}, ranks=True)
