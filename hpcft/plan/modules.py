"""Names of modules that adapters are asked for, against those that a model has: a rank's own, or a family's.

A name that is misspelt would train less than was asked, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hpcft.errors import Problem, near
from hpcft.plan.plan import TunerPlan

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA = (*ATTENTION, *FEED, *NORMS)
# model_type → the modules of a layer; of other families only the ranks know.
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": (*ATTENTION, "self_attn.q_norm", "self_attn.k_norm", *FEED, *NORMS),
    "gemma": LLAMA,
    "gemma2": (*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *NORMS),
}
SHOWN = 24  # names of a model's modules in a complaint


def modules_of(config: Mapping[str, Any], scored: bool) -> tuple[str, ...]:
    """The modules of the model that a config.json describes, by transformers' names; empty where they are not known."""
    family, layers = FAMILIES.get(str(config.get("model_type"))), config.get("num_hidden_layers")
    if family is None or config.get("auto_map") or not isinstance(layers, int):
        return ()
    inner = (f"model.layers.{number}.{name}" for number in range(layers) for name in family)
    leaves = ("model.embed_tokens", *inner, "model.norm", "score" if scored else "lm_head")
    parts = (name.split(".") for name in leaves)
    return tuple(dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)))


def unmatched(tuner: TunerPlan, names: Collection[str]) -> dict[str, list[Problem]]:
    """Leaf of ``tuner`` → its words that no module of the model answers to, as peft compares them.

    names: of all modules, those that hold others too.
    """
    targets = [word for word in tuner.target_modules if word not in names and not _ends(names, f".{word}")]
    if tuner.target_modules == ("all-linear",):
        targets = []
    saved = [word for word in tuner.modules_to_save if not _ends(names, word)]
    holders = {name.rpartition(".")[0] for name in names}
    last = (name.rpartition(".")[2] for name in names if name not in holders)
    known = tuple(dict.fromkeys(word for word in last if not word.isdigit()))
    return {
        leaf: [_problem(leaf, word, known) for word in words]
        for leaf, words in (("target_modules", targets), ("modules_to_save", saved))
        if words and tuner.kind == "lora"
    }


def _ends(names: Collection[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _problem(leaf: str, word: str, known: tuple[str, ...]) -> Problem:
    guess = near(word, known)
    hint = f"did you mean {guess}?" if guess else ""
    if word == "all-linear":
        hint = "all-linear stands alone: it is every linear module but the head"
    return Problem(f"tuner.{leaf}: the model has no such module", "", word, known[:SHOWN], hint)
