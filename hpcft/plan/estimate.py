"""Estimates that are shown and never decide: parameters from a model's configuration, time from peak speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.plan.plan import Plan

# Dense bf16 (fp16 where there is no bf16) peak of one GPU in TFLOP/s, from the vendors' data sheets, without sparsity.
PEAK_TFLOPS: dict[str, float] = {
    "h100": 989, "h200": 989, "gh200": 989, "b200": 2250, "a100": 312, "a10": 125, "a40": 150, "l40s": 362, "l4": 121,
    "v100": 125, "t4": 65, "mi250": 191.5, "mi250x": 191.5, "mi300x": 1307, "mi300a": 981,
}  # fmt: skip
USUAL_UTILISATION = 0.4  # share of the peak that a tuned run of this kind reaches


def model_config(plan: Plan) -> Mapping[str, Any] | None:
    """config.json of a model in a local folder; None where it cannot be read here."""
    try:
        config = json.loads((Path(plan.model.path).expanduser() / "config.json").read_text())
        return config if isinstance(config, dict) else None
    except (OSError, ValueError):
        return None


def parameters(config: Mapping[str, Any]) -> int | None:
    """Weights of a dense Llama-like decoder, norms and biases left out (under 0.1 %); None for other shapes.

    Embeddings V·H, once when tied; per layer attention H·(2·heads + 2·kv)·d and a gated feed-forward 3·H·I.
    """
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if config.get("num_experts") or config.get("num_local_experts"):
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
