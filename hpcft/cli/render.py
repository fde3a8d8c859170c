"""``hpcft render``: the sbatch script, for reading, for checking in, for ``sbatch``."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, plan_run, run_words


@click.command("render", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write here instead of stdout.")
@click.option("--check", type=click.Path(path_type=Path), help="Exit 1 where FILE is not what would be rendered.")
@click.option("--diff", type=click.Path(path_type=Path), help="Show how FILE differs; exit 1 where it does.")
@click.option("--prepare", is_flag=True, help="The script of the job that prepares the data (prepare: job).")
@run_words
def command(words: tuple[str, ...], output: Path | None, check: Path | None, diff: Path | None, prepare: bool) -> None:
    """Write the sbatch script of a run. Same YAML, same bytes; it runs, and runs again, with plain sbatch."""
    from hpcft.launch.render import render, render_preparation

    plan = plan_run(words).plan
    own = Path(plan.resources.template) if plan.resources.template else None
    text = render_preparation(plan) if prepare else render(plan, own)
    if check or diff:
        _compare(text, check or diff or Path(), show=diff is not None)
    elif output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)
        click.echo(f"wrote {output}; next: sbatch {output}", err=True)


def _compare(text: str, file: Path, show: bool) -> None:
    from hpcft.errors import refuse

    try:
        there = file.read_bytes().decode("utf-8")  # as it is: sbatch refuses a script whose lines end in CR LF
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("cannot be read", where=str(file), value=error, hint="write it with: hpcft render -o") from error
    if there == text:
        click.echo(f"{file} is what this run renders", err=True)
        return
    if show:
        lines = difflib.unified_diff(
            there.splitlines(keepends=True), text.splitlines(keepends=True), str(file), "rendered now"
        )
        click.echo("".join(lines), nl=False)
    how = " in its line ends alone (CR LF)" if there.replace("\r\n", "\n") == text else ""
    click.echo(f"{file} differs from what this run renders{how}; next: hpcft render … -o {file}", err=True)
    sys.exit(1)


def _write(path: Path, text: str) -> None:
    """Raises Refusal where that would cost a file that hpcft did not render."""
    from hpcft.errors import refuse

    if not _may_be_replaced(path):
        what = "already there, and no script that hpcft rendered"
        raise refuse(what, where=str(path), hint="give another name behind -o, or remove the file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise refuse(f"cannot be written: {error.strerror}", where=str(path)) from error


def _may_be_replaced(path: Path) -> bool:
    """Whether there is no file, an empty one, or one that carries a plan as a script does, of any template."""
    from hpcft.config.source import is_file
    from hpcft.launch.render import TERMINATOR

    try:
        text = path.read_bytes() if is_file(path) else b""
    except OSError:
        return False
    carries = TERMINATOR.encode() in text.splitlines() or all(key in text for key in (b'"schema": ', b'"hpcft": "'))
    return not text.strip() or (text.startswith(b"#!") and carries)
