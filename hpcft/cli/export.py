"""``hpcft export``: an ordinary Hugging Face folder from a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcft.cli.common import find_run

if TYPE_CHECKING:
    from hpcft.plan.plan import Plan


@click.command("export")
@click.argument("run", metavar="RUN")
@click.option(
    "--checkpoint", metavar="WHICH", help="latest, best, a step, or a folder; default: what the run asks for."
)
@click.option("--fallback", is_flag=True, help="Take the newest whole checkpoint where that one is broken.")
@click.option("--merge", is_flag=True, help="Merge LoRA into the original base; the logit change is reported.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Type of the exported weights.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default: in the run folder.")
def command(
    run: str, checkpoint: str | None, fallback: bool, merge: bool, dtype: str | None, output: Path | None
) -> None:
    """Write adapter or model, tokenizer, generation settings and a model card of RUN, a name or a folder.

    What is written is loaded again and compared before it is published.
    """
    from hpcft.launch.processes import run_module
    from hpcft.run.folder import read_plan

    paths = find_run(run)
    plan = read_plan(paths)
    words = ["--run", str(paths.root)]
    options = {"--checkpoint": checkpoint, "--dtype": dtype, "--output": output, "--store": _store(plan)}
    for option, value in options.items():
        words += [option, str(value)] if value is not None else []
    words += [flag for flag, wanted in (("--merge", merge), ("--fallback", fallback)) if wanted]
    sys.exit(run_module("hpcft.train.export", plan, *words))


def _store(plan: Plan) -> Path | None:
    """Where the prepared data is, if this machine knows: the audit in it tells which token ends an answer."""
    from hpcft.errors import Refusal
    from hpcft.run.expand import store_folder

    try:
        return store_folder(plan)
    except Refusal:
        return None
