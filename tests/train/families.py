"""Small models of several families, with real weights on disk, and the layouts that the strategies are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpcft.plan.plan import Plan
from tests import plans
from tests.train.small import VOCABULARY

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

# name → strategy and the degrees of its axes
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "one process": ("ddp", {"dp": 1}),
    "DDP": ("ddp", {"dp": 4}),
    "ZeRO-1": ("zero1", {"dp": 4}),
    "ZeRO-2": ("zero2", {"dp": 4}),
    "ZeRO-3": ("zero3", {"dp": 4}),
    "FSDP2": ("fsdp", {"dp": 4}),
    "HSDP": ("fsdp", {"dp_replicate": 2, "dp": 2}),
    "TP": ("ddp", {"dp": 1, "tp": 4}),
    "FSDP2×TP": ("fsdp", {"dp": 2, "tp": 2}),
    "DDP×TP": ("ddp", {"dp": 2, "tp": 2}),
}


def save(folder: Path, family: str) -> Path:
    """A folder with a small random model of ``family``: configuration and safetensors."""
    import transformers

    kind, particular = FAMILIES[family]
    config = getattr(transformers, kind)(**{**SIZES, **particular})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms that differ from their neutral values
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def plan_for(folder: Path, layout: str, kind: str = "full", **changes: Any) -> Plan:
    """The tiny Plan on ``layout``, global batch of 8 windows, two of them at a time where a rank has as many."""
    strategy, degrees = LAYOUTS[layout]
    return plan_with(folder, strategy, degrees, kind, **changes)


def plan_with(folder: Path, strategy: str, degrees: dict[str, int], kind: str = "full", **changes: Any) -> Plan:
    from hpcft.catalog import STRATEGIES

    ranks = 1
    for degree in degrees.values():
        ranks *= degree
    data = degrees.get("dp", 1) * degrees.get("dp_replicate", 1)
    per_rank = 8 // data
    sections: dict[str, Any] = {
        "model": {"path": str(folder), "from_scratch": False, "attention": "auto"},
        "tuner": {"kind": kind},
        "layout": plans.layout(1, ranks, **degrees),
        "batch": {"global_windows": 8, "micro_windows": max(1, per_rank // 2), "accumulation": 2},
        "train": {"strategy": strategy, "strategy_module": STRATEGIES[strategy].module, "eval_steps": -1},
        "optim": {"max_steps": 3, "max_grad_norm": 1.0, "weight_decay": 0.1},
        "checkpoint": {"save_steps": 0},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values} if isinstance(values, dict) else values
    return plans.plan(**sections)
