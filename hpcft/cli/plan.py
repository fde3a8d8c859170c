"""``hpcft plan``: what would be run, before anything is queued."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, plan_run, refuse_absent_weights, run_words

if TYPE_CHECKING:
    from hpcft.plan.plan import Plan
    from hpcft.plan.prepared import PreparedFacts


@click.command("plan", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="The Plan itself, as the job will read it.")
@click.option("--all", "show_all", is_flag=True, help="Also the keys that stand at their default.")
@run_words
def command(words: tuple[str, ...], as_json: bool, show_all: bool) -> None:
    """Show what would be run: layout, batch, data, steps, time and environment, with the arithmetic."""
    planned = plan_run(words, hub="cache")
    refuse_absent_weights(planned.plan, planned.loaded.origins)
    if as_json:
        click.echo(planned.plan.to_json(), nl=False)
        return
    from hpcft.plan.explain import explain

    said = planned.settings if show_all else planned.chosen
    click.echo(explain(planned.plan, _prepared(planned.plan), said, planned.cluster_file), nl=False)
    click.echo(f"\nnext: hpcft submit {shlex.join(words)}", err=True)


def _prepared(plan: Plan) -> PreparedFacts | None:
    """What is prepared, where this machine can see it."""
    from hpcft.errors import Refusal
    from hpcft.plan.prepared import prepared_facts
    from hpcft.run.expand import store_folder

    try:
        return prepared_facts(store_folder(plan), plan.data)
    except Refusal:  # $SCRATCH and the like are not set where the plan is only looked at
        return None
