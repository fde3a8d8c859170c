"""Small models of several families, with real weights on disk, and the layouts that the strategies are tried on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from hpcft.plan.plan import Plan
from hpcft.train import miniature
from hpcft.train.equivalence import ALONE, Case, case_plan, cases
from hpcft.train.miniature import VOCABULARY
from tests import plans

BATCH = 8

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}

# family → configuration class and what is particular about it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "vocab_size": VOCABULARY + 1}),  # biases; uneven vocabulary
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),  # norms on queries and keys
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "num_hidden_layers": 2}),  # soft caps, more norms
    "phi": ("PhiConfig", {"qk_layernorm": False}),  # biases behind row-parallel linears, parallel mlp
    "phi3": ("Phi3Config", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),  # fused projections
}

# name → strategy and the degrees of its axes, on four ranks
LAYOUTS: dict[str, Case] = {case.name: case for case in (ALONE, *cases(plans.layout(1, 4), heads=4))}


def save(folder: Path, family: str) -> Path:
    """A folder with a small random model of ``family``: configuration and safetensors."""
    import transformers

    kind, particular = FAMILIES[family]
    return miniature.save(getattr(transformers, kind)(**{**SIZES, **particular}), folder)


def plan_for(folder: Path, layout: str, kind: str = "full", **changes: Any) -> Plan:
    """The tiny Plan on ``layout``, global batch of 8 windows, two of them at a time where a rank has as many."""
    return plan_with(folder, LAYOUTS[layout].strategy, dict(LAYOUTS[layout].degrees), kind, **changes)


def plan_with(folder: Path, strategy: str, degrees: dict[str, int], kind: str = "full", **changes: Any) -> Plan:
    """The same on any strategy and degrees of its axes, with further changes by section."""
    case = Case(strategy, strategy, degrees)
    plan = case_plan(plans.plan(), case, folder, kind, case.layout(1, math.prod(degrees.values())), BATCH)
    for section, values in changes.items():
        new = dataclasses.replace(getattr(plan, section), **values) if isinstance(values, dict) else values
        plan = dataclasses.replace(plan, **{section: new})
    return plan
