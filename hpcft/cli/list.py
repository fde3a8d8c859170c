"""``hpcft list``: the runs of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hpcft.cli.status import as_dict, progress
from hpcft.errors import printable


@click.command("list")
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, for a program.")
def command(folder: Path, as_json: bool) -> None:
    """The runs in FOLDER, newest first: name, state, progress, job. FOLDER is the runs' output_dir; default: runs/."""
    from hpcft.launch.watch import runs

    found = runs(folder)
    if as_json:
        click.echo(json.dumps([as_dict(run) for run in found], indent=2))
        return
    if not found:
        click.echo(f"no runs in {folder}; next: hpcft submit run.yaml   or: hpcft list OUTPUT_DIR", err=True)
    width = max((len(run.name) for run in found), default=0)
    for run in found:
        why = printable(run.why, 120) if run.state == "unknown" else ""
        click.echo(f"{run.name:<{width}}  {run.state:<10}  {progress(run):<18}  {run.job or ''}  {why}".rstrip())
