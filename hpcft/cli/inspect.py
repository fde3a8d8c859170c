"""``hpcft inspect``: what the model will really see, and which tokens it is trained on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, pinned, plan_run, refuse_missing_files, run_words

if TYPE_CHECKING:
    from hpcft.plan.plan import Plan


@click.command("inspect", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--index", type=click.IntRange(min=0), help="The window with this number, with all its records.")
@click.option("--random", "random_", type=click.IntRange(min=1), help="So many records, picked anew each time.")
@click.option("--seed", type=click.IntRange(0, 2**53), help="Of --random; the run's own is train.seed=N here.")
@click.option("--windows", is_flag=True, help="With --random: whole windows.")
@click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)
@run_words
def command(
    words: tuple[str, ...], index: int | None, random_: int | None, seed: int | None, windows: bool, split: str
) -> None:
    """Show prepared records with the trained tokens marked. The data must be prepared: hpcft prepare."""
    from hpcft.launch.processes import run_data
    from hpcft.run.expand import store_folder

    which = _which(index, random_, seed, windows)
    planned = plan_run(words)
    refuse_missing_files(planned.plan, planned.loaded.origins)
    plan = pinned(planned)
    _refuse_unprepared(plan, words)
    sys.exit(run_data("inspect", plan, store_folder(plan), "--split", split, *which))


def _refuse_unprepared(plan: Plan, words: Sequence[str]) -> None:
    """The process that shows knows the request, and not the words that it came of."""
    from hpcft.errors import refuse
    from hpcft.plan.plan import data_key
    from hpcft.run.expand import store_folder

    store = store_folder(plan)
    if not (store / "requests" / f"{data_key(plan.data)}.json").is_file():
        hint = f"hpcft prepare {shlex.join(words)}"
        raise refuse("the data of this run is not prepared", where=str(store), hint=hint)


def _which(index: int | None, random_: int | None, seed: int | None, windows: bool) -> list[str]:
    """The words for the process that shows. Raises Refusal for options that do not go together."""
    from hpcft.errors import refuse

    if random_ is None:
        for option, given in (("--seed", seed), ("--windows", windows or None)):
            if given is not None:
                hint = "add --random 5" + ("; the seed of the run is train.seed=N" if option == "--seed" else "")
                value = "" if given is True else given
                raise refuse(f"{option} is about --random, which is not here", value=value, hint=hint)
        return ["--index", str(index or 0)]
    if index is not None:
        raise refuse("--index and --random do not go together", value=f"{index} and {random_}", hint="leave one out")
    return ["--random", str(random_), *(["--seed", str(seed)] if seed is not None else []), *["--windows"] * windows]
