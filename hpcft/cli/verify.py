"""``hpcft verify``: do all strategies compute the same on these nodes?"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from hpcft.cli.common import RUN_EPILOG, RUN_WORDS, plan_run, run_words

if TYPE_CHECKING:
    from hpcft.plan.plan import Plan

COLUMNS = ("strategy", "axes", "type", "difference", "allowed", "")


@click.command("verify", context_settings=RUN_WORDS, epilog=RUN_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
@run_words
def command(words: tuple[str, ...], as_json: bool) -> None:
    """Train the run's model in miniature with every strategy that its ranks allow, and compare with one process.

    On the run's own nodes, in about a minute: as a small job that is waited for, inside an allocation through srun,
    without Slurm as processes of this machine. Neither data nor weights are needed. Exit code 0: the losses and
    gradient norms of three optimizer steps agree; 1: a strategy differs or failed.
    """
    from hpcft.errors import count
    from hpcft.launch import verify

    plan = verify.own_plan(plan_run(words, hub="fetch").plan)
    start = verify.where(plan)
    verify.interruptible()
    click.echo(f"comparing strategies on {count(plan.layout.world_size, 'rank')}; about a minute", err=True)
    with verify.folder(plan) as paths:
        code = start(plan, paths)
        table = verify.found(paths)
    rows = table.get("rows", [])
    good = code == 0 and bool(rows) and all(row["verdict"] in ("ok", "absent") for row in rows)
    if as_json:
        click.echo(json.dumps({**table, "ok": good}, indent=2, ensure_ascii=False))
    elif rows:
        click.echo(page(plan, table), nl=False)
    if not good:
        click.echo(f"{verify.last_words(paths)}\nlogs of the ranks: {paths.attempt(1)}".strip(), err=True)
    sys.exit(0 if good else 1)


def page(plan: Plan, table: Mapping[str, Any]) -> str:
    """The table for people: what was compared, then a line for each case."""
    layout, tuning = plan.layout, {"full": "every weight", "lora": "LoRA"}[table["kind"]]
    lines = [
        f"model       {table['family']} in miniature, {tuning} trained, 3 optimizer steps",
        f"ranks       {layout.nodes} × {layout.ranks_per_node}, {table['device']}, {plan.resources.backend}",
        f"software    {table['versions']}",
        "difference  the largest of a loss or gradient norm, relative to one process",
    ]
    if table["note"]:
        lines.insert(1, f"            not the run's own: {table['note']}")
    return "\n".join([*lines, "", *_columns([_cells(row) for row in table["rows"]])]) + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    difference = "–" if row["difference"] is None else f"{row['difference']:.1e}"
    verdict = "DIFFERS" if row["verdict"] == "differs" else row["verdict"]
    words = f"{verdict}: {row['note']}" if row["note"] else verdict
    return (row["strategy"], row["axes"], row["dtype"], difference, f"{row['tolerance']:.0e}", words)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[n]) for row in (COLUMNS, *rows)) for n in range(len(COLUMNS))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (COLUMNS, *rows)]  # fmt: skip
