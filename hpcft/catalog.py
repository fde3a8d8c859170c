"""What can be plugged in, as rows of plain facts; each row names its module by string, loaded when used.

A strategy, an objective or a data format is one file and one row here; ``tests/test_catalog.py`` closes the
loop between rows, files and docs. Nothing is imported here, so a login node can read the table in no time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """How the model is spread over ranks. ``axes``: the mesh axes it uses, outermost first."""

    name: str
    module: str
    axes: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``rows``: the kind of prepared row it needs."""

    name: str
    module: str
    rows: str
    about: str


@dataclass(frozen=True)
class Format:
    """A shape of data record. ``keys``: one of these sets of keys must be present; ``sample``: one record as JSON."""

    name: str
    module: str
    keys: tuple[frozenset[str], ...]
    sample: str
    about: str


STRATEGIES: dict[str, Strategy] = {
    row.name: row
    for row in (
        Strategy(
            "ddp", "hpcft.train.strategies.ddp", ("dp",), "every rank holds the whole model; gradients are summed"
        ),
    )
}

OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("sft", "hpcft.train.objectives.sft", "chat", "next-token loss on the assistant's words"),
    )
}

# Words that people bring from other tools and that this release does not do: name → what to use instead.
LATER_STRATEGIES: dict[str, str] = {
    "zero1": "ddp",
    "zero2": "ddp",
    "zero3": "ddp with LoRA, which keeps optimizer memory small",
    "zero2_offload": "ddp with LoRA, which keeps optimizer memory small",
    "zero3_offload": "ddp with LoRA, which keeps optimizer memory small",
    "fsdp": "ddp with LoRA, which keeps optimizer memory small",
    "fsdp_offload": "ddp with LoRA, which keeps optimizer memory small",
}
LATER_OBJECTIVES: dict[str, str] = {
    "pretrain": "sft on raw text records, which trains every token",
    "dpo": "sft on the chosen answers",
    "kto": "sft on the answers labelled good",
    "orpo": "sft on the chosen answers",
    "cpo": "sft on the chosen answers",
    "simpo": "sft on the chosen answers",
    "rm": "sft",
}
