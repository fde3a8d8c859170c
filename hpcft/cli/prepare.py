"""``hpcft prepare``: the data as packed windows, made once on CPUs before GPUs are held."""

from __future__ import annotations

import sys

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, pinned, plan_run, refuse_missing_files, run_words


@click.command("prepare", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="The label audit as JSON.")
@run_words
def command(words: tuple[str, ...], as_json: bool) -> None:
    """Read, mask, pack and store the data of a run, and print the label audit. Prepared data is found again."""
    from hpcft.launch.processes import run_prepare
    from hpcft.run.expand import store_folder

    planned = plan_run(words)
    refuse_missing_files(planned.plan, planned.loaded.origins)
    plan = pinned(planned)
    sys.exit(run_prepare(planned.plan, plan, store_folder(plan), *(["--json"] if as_json else [])))
