"""``hpcft resume``: go on with a run that has ended."""

from __future__ import annotations

import click

from hpcft.cli.common import find_run


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
    submitted = hand_over(plan, goes_to_slurm(plan), paths.root)
    report(submitted, plan)
