"""The table of what ``strategy: auto`` decides: models × tuners × layouts × GPUs, a page of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcft.catalog import AUTO
from hpcft.config.cluster import ClusterProfile
from hpcft.config.load import load_run
from hpcft.config.reference import GENERATED
from hpcft.errors import Refusal
from hpcft.plan.auto import decide, gib, named
from hpcft.plan.make import question
from hpcft.plan.plan import Plan
from hpcft.plan.ways import Way, memory_of, pace
from tests.plan.models import shape

MODELS = ("0.5B", "1.5B", "7B", "14B", "32B", "72B")
TUNERS = ("full", "lora", "qlora")
LAYOUTS = ((1, 1), (1, 4), (1, 8), (2, 8), (8, 8))
CARDS = {"A100, 40 GB": ("a100", 40), "H100, 80 GB": ("h100", 80), "H200, 141 GB": ("h200", 141)}
WINDOWS, LENGTH, NODE_GIB = 128, 2048, 1024

HEAD = f"""{GENERATED}# What `strategy: auto` decides

Qwen2.5's shapes, {WINDOWS} windows of {LENGTH:,} tokens an optimizer step, `gradient_checkpointing: auto`, LoRA of
rank 8 on all linear modules, nodes of eight GPUs with {NODE_GIB} GiB of their own on InfiniBand. A cell names the
strategy, what is recomputed, the predicted GiB of a GPU, and predicted tokens a second and GPU; where nothing fits, in
parentheses, the fewest GPUs that would hold the run without offloading. Predictions rest on constants that no GPU has
confirmed yet.
"""


def page() -> str:
    """One table for each model."""
    return HEAD + "".join(_table(model) for model in MODELS)


def _table(model: str) -> str:
    rows = [f"| {tuner} | {n} × {g} | " + " | ".join(cells) + " |\n" for tuner, (n, g), cells in _rows(model)]
    head = f"| tuner | GPUs | {' | '.join(CARDS)} |\n| --- | --- |{' --- |' * len(CARDS)}\n"
    return f"\n## Qwen2.5-{model}\n\n{head}{''.join(rows)}"


def _rows(model: str) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
    for tuner in TUNERS:
        for layout in LAYOUTS:
            yield tuner, layout, [cell(model, tuner, layout, card) for card in CARDS]


def cell(model: str, tuner: str, layout: tuple[int, int], card: str) -> str:
    """One decision in a few words."""
    try:
        plan = decided(model, tuner, layout, card)
    except Refusal as refusal:
        return _refused(refusal)
    speed = LENGTH / pace(plan) / plan.layout.world_size
    return f"{named(plan)}, {plan.train.recomputation}, {gib(memory_of(plan).total)}, {speed:,.0f}"


def _refused(refusal: Refusal) -> str:
    layouts = [words for words in refusal.problems[0].choices if re.match(r"\d+ × \d+ GPUs with ", words)]
    return f"({layouts[-1].partition(' (')[0].replace(' GPUs with', ', by')})" if layouts else "(nothing)"


def decided(model: str, tuner: str, layout: tuple[int, int], card: str) -> Plan:
    """The Plan that auto comes to. Raises Refusal where nothing fits."""
    words = ["--model", f"Qwen2.5-{model}", "--dataset", "a.jsonl", "--strategy", AUTO, "--max_length", str(LENGTH)]
    words += ["--tuner_type", "full" if tuner == "full" else "lora", "--global_batch_size", str(WINDOWS)]
    words += ["--nodes", str(layout[0]), "--nproc_per_node", str(layout[1])]
    words += ["--quant_bits", "4"] if tuner == "qlora" else []
    return decide(question(load_run(words).run, cluster(card), {}, shape(f"Qwen2.5-{model}")), Way(AUTO))


def cluster(card: str) -> ClusterProfile:
    """Nodes of eight such GPUs."""
    kind, gigabytes = CARDS[card]
    return ClusterProfile(
        name="any", gpu_type=kind, gpu_memory=gigabytes, gpus_per_node=8, cores_per_node=96, max_nodes=64,
        node_memory=NODE_GIB, fabric="infiniband", time=1440,
    )  # fmt: skip
