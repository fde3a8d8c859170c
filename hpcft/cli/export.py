"""``hpcft export``: an ordinary Hugging Face folder from a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpcft.cli.common import find_run


@click.command("export")
@click.argument("run", metavar="RUN")
@click.option("--checkpoint", default=None, metavar="WHICH", help="latest, best, a step, or a folder.")
@click.option("--merge", is_flag=True, help="Merge LoRA into the original base; the logit change is reported.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Type of the exported weights.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default: in the run folder.")
def command(run: str, checkpoint: str | None, merge: bool, dtype: str | None, output: Path | None) -> None:
    """Write adapter or model, tokenizer, generation settings and a model card of RUN, a name or a folder."""
    from hpcft.launch.entry import read_plan
    from hpcft.launch.processes import run_module

    paths = find_run(run)
    words = ["--run", str(paths.root)]
    for option, value in (("--checkpoint", checkpoint), ("--dtype", dtype), ("--output", output)):
        words += [option, str(value)] if value is not None else []
    sys.exit(run_module("hpcft.train.export", read_plan(paths), *words, *(["--merge"] if merge else [])))
