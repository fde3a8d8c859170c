"""``hpcft plan``: what would be run, before anything is queued."""

from __future__ import annotations

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, plan_run, run_words, store_folder


@click.command("plan", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="The Plan itself, as the job will read it.")
@run_words
def command(words: tuple[str, ...], as_json: bool) -> None:
    """Show what would be run: layout, batch, data, steps, time and environment, with the arithmetic."""
    planned = plan_run(words)
    if as_json:
        click.echo(planned.plan.to_json(), nl=False)
        return
    from hpcft.plan.explain import explain
    from hpcft.plan.prepared import prepared_facts

    facts = prepared_facts(store_folder(planned.plan), planned.plan.data)
    click.echo(explain(planned.plan, facts, planned.chosen), nl=False)
    file = planned.loaded.file or "…"
    click.echo(f"\nnext: hpcft submit {file}", err=True)
