"""Estimates that are shown and never decide: how many tokens files of text hold."""

from __future__ import annotations

import os
from pathlib import Path

from hpcft.plan.plan import ModelPlan, Plan, Source

TEXT_FILES = (".jsonl", ".json", ".csv", ".txt")
BYTES_PER_TOKEN = 4  # of English text and its JSON; other languages and code differ by a factor of two


def is_absent(source: Source | ModelPlan) -> bool:
    """Is this a plain path under which nothing is found here? The machine that needs it may be another one."""
    plain = source.source == "local" and not set("*?[$") & set(source.path)
    return plain and not os.path.exists(os.path.expanduser(source.path))  # unlike Path's, no name makes them raise


def guessed_tokens(plan: Plan) -> int | None:
    """Tokens of the training data as the size of its files has it; None where one of them is not text on this machine.

    Of compressed and columnar files the size says little; of ``#N`` rows, the mean row of the file's first megabyte.
    """
    total = 0.0
    for source in plan.data.train:
        path = Path(os.path.expanduser(source.path))
        if source.source != "local" or path.suffix not in TEXT_FILES:
            return None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(1 << 20)
        except (OSError, ValueError):
            return None
        lines = head.count(b"\n")
        if source.rows and (path.suffix == ".json" or not lines):  # a JSON list may have any number of lines a row
            return None
        total += len(head) / lines * source.rows if source.rows else size
    return int(total * (1 - plan.data.validation_ratio) / BYTES_PER_TOKEN) or None
