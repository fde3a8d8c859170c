"""Estimates that are shown and never decide: parameters from a model's configuration, time from peak speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.plan.plan import Plan

# Dense bf16 (fp16 where there is no bf16) peak of one GPU (one die of an MI250) in TFLOP/s, from the vendors' data
# sheets, without sparsity; the fastest form of each, SXM where there is one.
PEAK_TFLOPS: dict[str, float] = {
    "h100": 989, "h200": 989, "gh200": 989, "b200": 2250, "a100": 312, "a10": 125, "a40": 150, "l40s": 362, "l4": 121,
    "v100": 125, "t4": 65, "mi250": 181, "mi250x": 191.5, "mi300x": 1307, "mi300a": 981,
}  # fmt: skip
# Keys of a config.json that has experts, or attention through a latent: their weights are counted otherwise.
OTHER_SHAPES = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")
TEXT_FILES = (".jsonl", ".json", ".csv", ".txt")
BYTES_PER_TOKEN = 4  # of English text and its JSON; other languages and code differ by a factor of two
USUAL_UTILISATION = 0.4  # share of the peak that a tuned run of this kind reaches


def model_config(plan: Plan) -> Mapping[str, Any] | None:
    """config.json of a model in a local folder; None where it cannot be read here."""
    try:
        config = json.loads((Path(plan.model.path).expanduser() / "config.json").read_text())
        return config if isinstance(config, dict) else None
    except (OSError, ValueError):
        return None


def guessed_tokens(plan: Plan) -> int | None:
    """Tokens of the training data as the size of its files has it; None where one of them is not text on this machine.

    Of compressed and columnar files the size says little; of ``#N`` rows, the mean row of the file's first megabyte.
    """
    total = 0.0
    for source in plan.data.train:
        path = Path(source.path).expanduser()
        if source.source != "local" or path.suffix not in TEXT_FILES:
            return None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(1 << 20)
        except OSError:
            return None
        lines = head.count(b"\n")
        if source.rows and (path.suffix == ".json" or not lines):  # a JSON list may have any number of lines a row
            return None
        total += len(head) / lines * source.rows if source.rows else size
    return int(total * (1 - plan.data.validation_ratio) / BYTES_PER_TOKEN) or None


def parameters(config: Mapping[str, Any]) -> int | None:
    """Weights of a dense Llama-like decoder, norms and biases left out (under 0.1 %); None for other shapes.

    A feed-forward with a gate is told by its activation, SiLU (or Gemma's GELU): older families have none.

    Embeddings V·H, once when tied; per layer attention H·(2·heads + 2·kv)·d and a gated feed-forward 3·H·I.
    """
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    gated = config.get("hidden_act") in ("silu", "swish") or str(config.get("model_type")).startswith("gemma")
    if not gated or any(config.get(other) for other in OTHER_SHAPES):
        return None
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (hidden * size * (2 * heads + 2 * keys) + 3 * hidden * inner)


def seconds_per_step(plan: Plan, weights: int) -> float | None:
    """Seconds of one optimizer step at the usual utilisation; None where the GPU's peak is not known.

    Work: 6 FLOP per weight and token for full training, 4 for LoRA, whose frozen weights need no gradient
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); full recomputation adds 2.
    """
    peak = PEAK_TFLOPS.get((plan.resources.gpu_type or "").lower())
    if peak is None or plan.resources.accelerator == "cpu":
        return None
    work = (6 if plan.tuner.kind == "full" else 4) + (2 if plan.train.recomputation == "full" else 0)
    tokens = plan.batch.global_windows * plan.data.max_length
    return work * weights * tokens / (plan.layout.world_size * peak * 1e12 * USUAL_UTILISATION)
