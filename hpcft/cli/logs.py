"""``hpcft logs``: what the ranks print, by attempt and rank."""

from __future__ import annotations

from pathlib import Path

import click

from hpcft.cli.common import find_run, spelt


@click.command("logs")
@click.argument("run", metavar="RUN")
@click.option("--follow", "-f", is_flag=True, help="As they are written, over attempts, until the run has ended.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Whose log.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of which attempt; the newest when not given.")
@click.option("--files", is_flag=True, help="The names of the log files instead.")
def command(run: str, follow: bool, rank: int, attempt: int | None, files: bool) -> None:
    """Print the log of a rank of RUN."""
    from hpcft.launch import logs

    paths = find_run(run)
    if follow:
        follow_run(paths.root, rank, attempt)
        return
    for line in logs.log_files(paths, attempt) if files else logs.read(paths, rank, attempt):
        click.echo(line)


def follow_run(folder: Path, rank: int = 0, attempt: int | None = None, every: float = 3) -> bool:
    """Print a rank's lines until the run has ended; Ctrl-C ends the printing, not the run. Whether it is finished.

    every: seconds between two questions how it stands.
    """
    import time

    from hpcft.errors import LONGEST, printable
    from hpcft.launch import logs
    from hpcft.launch.transport import slurm_here
    from hpcft.launch.watch import status
    from hpcft.run.paths import RunPaths

    asked, alive = float("-inf"), True

    def over() -> bool:
        nonlocal asked, alive
        if time.monotonic() - asked > every:  # squeue is the site's, not ours alone
            now = status(folder)
            # While Slurm cannot say how the run stands, its log is followed: an answer may come.
            asked, alive = time.monotonic(), now.alive or (now.state == "unknown" and slurm_here())
        return not alive

    try:
        for line in logs.follow(RunPaths(folder), over, rank, attempt):
            click.echo(line)
    except KeyboardInterrupt:
        click.echo(f"\nthe run goes on; next: hpcft status {spelt(folder)}", err=True)
        return False
    now = status(folder)
    click.echo(f"run {now.name} is {now.state}" + (f": {printable(now.why, LONGEST)}" if now.why else ""), err=True)
    return now.state == "finished"
