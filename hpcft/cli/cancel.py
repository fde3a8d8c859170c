"""``hpcft cancel``: end a run for good."""

from __future__ import annotations

import click

from hpcft.cli.common import find_run, spelt


@click.command("cancel")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """End RUN for good: its job is cancelled, and nothing starts it again but hpcft resume."""
    from hpcft.errors import refuse
    from hpcft.launch.watch import SlurmAway, cancel

    paths = find_run(run)
    try:
        click.echo(cancel(paths.root))
    except SlurmAway as error:
        raise refuse(
            f"Slurm does not answer: {error}", hint="try again; the run is marked as cancelled already"
        ) from error
    click.echo(f"next: hpcft status {spelt(paths.root)}", err=True)
