"""The ``hpcft`` command: a table of verbs, each a file of its own that is loaded when it is called."""

from __future__ import annotations

import gc
import importlib
import sys

import click

from hpcft import __version__
from hpcft.errors import EXIT_REFUSED, Refusal, near, printable, storage

# verb → what it does, in one line; the module is hpcft.cli.<verb>, the command in it is called `command`
VERBS: dict[str, str] = {
    "init": "Write a run and a cluster profile to start from, every key explained.",
    "plan": "Show what would be run: layout, batch, steps, time, environment, with the arithmetic.",
    "render": "Write the sbatch script; --check and --diff for scripts kept in a project.",
    "prepare": "Turn the data into packed windows, with a label audit.",
    "inspect": "Show a prepared record with its trained tokens marked.",
    "submit": "Prepare, render and hand over to Slurm, or run on this machine.",
    "verify": "Compare every strategy with one process, on the run's own nodes.",
    "status": "Where a run stands: state, step, attempts, checkpoints.",
    "list": "The runs of this folder.",
    "logs": "Print or follow the logs of a run, by attempt and rank.",
    "cancel": "End a run for good.",
    "resume": "Go on with a run that has ended, from its newest checkpoint.",
    "export": "Write a Hugging Face folder from a checkpoint.",
}


# What people type who come from other tools
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("sft", "train", "finetune", "fine-tune", "run", "launch", "sbatch", "start"), "submit"),
    **dict.fromkeys(("pt", "pretrain", "rlhf", "dpo"), "submit"),
    **dict.fromkeys(("merge", "merge-lora", "merge_lora"), "export --merge"),
    **dict.fromkeys(("preprocess", "tokenize"), "prepare"),
    **dict.fromkeys(("kill", "stop", "scancel"), "cancel"),
    **dict.fromkeys(("ls", "squeue"), "list"),
    **dict.fromkeys(("selftest", "equivalence"), "verify"),
    **dict.fromkeys(("check", "validate", "config", "show"), "plan"),
    "help": "--help",
}


class Verbs(click.Group):
    """A group whose commands are imported only when they are called, so that help stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"hpcft.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no such verb: {printable(args[0])}\n  hint: {_verb_hint(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _verb_hint(word: str) -> str:
    if word in ELSEWHERE:
        return f"here it is: hpcft {ELSEWHERE[word]}"
    guess = near(word, VERBS)
    return f"did you mean {guess}?" if guess else f"one of {', '.join(VERBS)}"


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="hpcft %(version)s")
def command() -> None:
    """Fine-tune language models on a Slurm cluster, or on this machine.

    \b
    hpcft init                     a run to start from: run.yaml, cluster.yaml
    hpcft plan run.yaml            what it will do, before anything is queued
    hpcft submit run.yaml          go; --key value changes any key for this once
    """


def main() -> None:
    """Run the command line; a Refusal becomes its words on stderr and exit code 2."""
    gc.set_threshold(100_000)  # imports make much that stays: collecting it again and again takes a tenth of the time
    try:
        command()
    except Refusal as refusal:
        click.echo(refusal.report, err=True)
        sys.exit(EXIT_REFUSED)
    except BrokenPipeError:  # the reader of a pipe went away: nothing is wrong
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if (words := storage(error)) is None:
            raise
        click.echo(words.report, err=True)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
