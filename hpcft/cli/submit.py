"""``hpcft submit``: prepare, render, hand over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcft.cli.changed import refuse_changed
from hpcft.cli.common import (
    RUN_EPILOG,
    RUN_WORDS,
    pinned,
    plan_run,
    refuse_absent_weights,
    refuse_missing_files,
    run_words,
    spelt,
)

if TYPE_CHECKING:
    from hpcft.cli.common import Planned
    from hpcft.launch.transport import Submitted
    from hpcft.plan.plan import Plan


@click.command("submit", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--dry-run", is_flag=True, help="Show the script and what Slurm says of it; queue nothing.")
@click.option("--follow", "-f", is_flag=True, help="Then follow the logs; exit 1 where the run does not finish.")
@run_words
def command(words: tuple[str, ...], dry_run: bool, follow: bool) -> None:
    """Prepare the data, render the script and hand it to Slurm; without Slurm, run on this machine.

    Submitted again, a run that has not finished goes on at its newest checkpoint.
    """
    planned = plan_run(words, hub="cache" if dry_run else "fetch")
    on_slurm = goes_to_slurm(planned.plan)
    refuse_changed(planned)
    if dry_run:
        refuse_absent_weights(planned.plan, planned.loaded.origins)
        _dry_run(planned.plan, on_slurm)
        return
    refuse_missing_files(planned.plan, planned.loaded.origins, ranks=True)
    if python_is_the_ranks(planned.plan, on_slurm):
        from hpcft.launch.preflight import refuse_missing_packages

        refuse_missing_packages(planned.plan)
    plan = _prepared(planned, on_slurm)
    submitted = hand_over(plan, on_slurm)
    report(submitted, plan)
    if follow:
        from hpcft.cli.logs import follow_run

        sys.exit(0 if follow_run(submitted.run) else 1)


def goes_to_slurm(plan: Plan) -> bool:
    """Whether the plan wants Slurm. Raises Refusal where it does and there is none here."""
    from hpcft.errors import refuse
    from hpcft.launch.transport import slurm_here

    if plan.resources.scheduler == "none":
        return False
    if not slurm_here():
        raise refuse(
            f"cluster {plan.resources.cluster} is a Slurm cluster, and this machine has no sbatch",
            hint="call this on a login node, or run on this machine with --cluster local",
        )
    return True


def python_is_the_ranks(plan: Plan, on_slurm: bool) -> bool:
    """Will the ranks run with this very Python? On Slurm setup lines or HPCFT_PYTHON may name another one."""
    return not on_slurm or (not plan.resources.setup and "HPCFT_PYTHON" not in os.environ)


def _prepared(planned: Planned, on_slurm: bool) -> Plan:
    """The plan with its hub names pinned and its data prepared; leaves with the data's exit code where that fails.

    A profile may leave the data to the job. On this machine there is none: what is not prepared now, nobody prepares.
    """
    from hpcft.launch.processes import run_prepare
    from hpcft.run.expand import store_folder

    plan = pinned(planned)
    now = plan.resources.prepare == "login" or not on_slurm  # else at the start of the job, or in one before it
    if now and (code := run_prepare(planned.plan, plan, store_folder(plan), aside=True)):
        sys.exit(code)
    return plan


def hand_over(plan: Plan, on_slurm: bool, run: Path | None = None) -> Submitted:
    """Render ``plan`` and start it. run: its folder, when not the default. Raises Refusal."""
    from hpcft.launch.render import render

    text = render(plan, Path(plan.resources.template) if plan.resources.template else None)
    if on_slurm:
        from hpcft.launch.transport import submit

        return submit(plan, text, run, preparing(plan))
    from hpcft.launch.background import submit_here

    return submit_here(plan, text, run)


def preparing(plan: Plan) -> str:
    """The script of the job that prepares the data of ``plan``; "" where none does, or the data is prepared."""
    from hpcft.launch.processes import is_prepared
    from hpcft.launch.render import render_preparation
    from hpcft.run.expand import store_folder

    if plan.resources.prepare_job is None or is_prepared(plan, store_folder(plan)):
        return ""
    return render_preparation(plan)


def report(submitted: Submitted, plan: Plan) -> None:
    """What was done, on stdout for programs; what to type next, on stderr."""
    from hpcft.errors import count

    where = (
        f"Slurm, partition {plan.resources.partition or 'default'}" if submitted.where == "slurm" else "this machine"
    )
    click.echo(f"{submitted.job_id} {submitted.run}")
    click.echo(f"run {plan.name} is with {where}: {count(plan.layout.world_size, 'rank')}", err=True)
    if submitted.preparation:
        click.echo(f"job {submitted.preparation} prepares its data first", err=True)
    run = spelt(submitted.run)
    click.echo(f"next: hpcft status {run}   or: hpcft logs -f {run}", err=True)


def _dry_run(plan: Plan, on_slurm: bool) -> None:
    """The script on stdout, Slurm's opinion on stderr; the same checks as a submission, and nothing is left behind."""
    import tempfile

    from hpcft.errors import count
    from hpcft.launch.render import render

    text = render(plan, Path(plan.resources.template) if plan.resources.template else None)
    click.echo(text, nl=False)
    if not on_slurm:
        click.echo(f"dry run: would start {count(plan.layout.world_size, 'rank')} on this machine", err=True)
        return
    from hpcft.launch.transport import check

    for what, script in (("dry run", text), ("its preparation", preparing(plan))):
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(script)
            file.flush()
            if script:
                click.echo(f"{what}: {check(Path(file.name))}", err=True)
