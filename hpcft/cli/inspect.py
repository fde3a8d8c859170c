"""``hpcft inspect``: what the model will really see, and which tokens it is trained on."""

from __future__ import annotations

import sys

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, plan_run, refuse_missing_files, run_words


@click.command("inspect", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--index", type=click.IntRange(min=0), help="The window with this number.")
@click.option("--random", "random_", type=click.IntRange(min=1), help="So many windows, picked anew each time.")
@click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)
@run_words
def command(words: tuple[str, ...], index: int | None, random_: int | None, split: str) -> None:
    """Show prepared records with the trained tokens marked. The data must be prepared: hpcft prepare."""
    from hpcft.launch.hub import resolve
    from hpcft.launch.processes import run_data
    from hpcft.run.expand import store_folder

    planned = plan_run(words)
    refuse_missing_files(planned.plan, planned.loaded.origins)
    plan = resolve(planned.plan)
    which = ["--random", str(random_)] if random_ else ["--index", str(index or 0)]
    sys.exit(run_data("inspect", plan, store_folder(plan), "--split", split, *which))
