"""``hpcft status``: where a run stands."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

import click

from hpcft.cli.common import find_run, spelt
from hpcft.errors import LONGEST, printable

if TYPE_CHECKING:
    from hpcft.launch.watch import RunStatus


@click.command("status")
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Everything, for a program.")
def command(run: str, as_json: bool) -> None:
    """Where RUN stands: state, optimizer step, newest checkpoint, and every attempt with how it ended.

    Asks squeue, then scontrol, then sacct where it is on, then the run's own ledger.
    """
    from hpcft.launch.watch import status

    now = status(find_run(run).root)
    click.echo(json.dumps(as_dict(now), indent=2) if as_json else _page(now))
    if not as_json:
        click.echo(_next(now), err=True)


def as_dict(now: RunStatus) -> dict[str, Any]:
    """A status as JSON takes it."""
    facts = dataclasses.asdict(now)
    return json.loads(json.dumps(facts, default=str)) | {"alive": now.alive}  # type: ignore[no-any-return]


def progress(now: RunStatus) -> str:
    """``step 120 of 400``."""
    return f"step {now.step:,}" + (f" of {now.total:,}" if now.total else "")


def _page(now: RunStatus) -> str:
    lines = [
        f"run         {now.name}: {now.state}" + (f" ({_shown(now.why)})" if now.why and _says_why(now) else ""),
        f"job         {now.job or 'none'} ({now.where})",
        f"progress    {progress(now)}"
        + (f", newest checkpoint at step {now.saved:,}" if now.saved is not None else ""),
        f"folder      {now.run}",
    ]
    if now.batch_log and not now.alive:
        lines.append(f"batch log   {now.batch_log}")
    if now.attempts and (startup := now.attempts[-1].startup):
        lines.append(f"start       {startup.words()}")
    for attempt in now.attempts:
        ended = attempt.ended or time.time()
        words = [f"{ended - attempt.began:.0f} s on {', '.join(attempt.nodes) or 'this machine'}"]
        words += [f"from step {attempt.first_step}"] if attempt.first_step is not None else []
        words += [f"saved step {attempt.last_saved}"] if attempt.last_saved is not None else []
        ending = attempt.ending or "running"
        why = f": {_shown(attempt.why)}" if attempt.why and attempt.why != ending else ""
        lines.append(f"attempt {attempt.number:<3} {', '.join(words)}; {ending}{why}")
    return "\n".join(lines)


def _shown(why: str) -> str:
    """A rank's last words may hold what would move the reader's cursor, or look like a line of ours."""
    return printable(why, LONGEST)


def _says_why(now: RunStatus) -> bool:
    return now.state == "preparing" or (not now.alive and now.why != now.state)


def _next(now: RunStatus) -> str:
    run = spelt(now.run)
    if now.state == "finished":
        return f"next: hpcft export {run}{_merge(now)}"
    if now.alive:
        return f"next: hpcft logs -f {run}"
    return f"next: hpcft logs {run}   or: hpcft resume {run}"


def _merge(now: RunStatus) -> str:
    """The option without which an export of the run would be refused."""
    from hpcft.errors import Refusal
    from hpcft.run.folder import read_plan
    from hpcft.run.paths import RunPaths

    try:
        return " --merge" if read_plan(RunPaths(now.run)).only_merged else ""
    except Refusal:  # of another release
        return ""
