"""The shape of a decoder, read from its config.json, and how many weights its parts have.

Understood: decoders in Llama's manner (Llama, Qwen, Mistral, Gemma, Phi-3 …), dense or with experts in every layer.
Anything else is None: a guess would be believed. Biases are left out, they are under 0.1 % of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Attention through a latent, experts beside dense layers, layers without attention: these are counted otherwise.
OTHER_SHAPES = (
    "kv_lora_rank", "n_routed_experts", "mlp_only_layers", "linear_num_value_heads", "attn_layer_period",
    "mamba_d_state", "mamba_d_ssm", "block_types", "layers_block_type",
)  # fmt: skip
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}  # all of the same weights
# Families whose config.json need not say that the head is the embedding's weight: it is, where nothing is said.
TIED = ("gemma", "cohere", "smollm3", "ernie4_5")
# Families that tensor ranks are known to cut right: proven equal to one process.
CUT = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "cohere", "granite", "glm", "glm4",
    "smollm3", "exaone4", "helium", "ernie4_5", "seed_oss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decoder. inner: width of a feed-forward, of one expert where there are experts (0: a dense model).

    shared_inner: width of the feed-forward that every token takes beside its experts_per_token experts. attention: the
    fastest that computes what the model asks for: flash, sdpa (with attention dropout) or eager (soft caps, sinks).
    positions: tokens of a text that the model was made for (0: it does not say).
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding's weight
    experts: int = 0
    experts_per_token: int = 0
    shared_inner: int = 0
    attention: str = "flash"
    positions: int = 0
    cut_by_tensor: bool = False  # of a family that tensor ranks are known to cut right

    @property
    def query(self) -> int:
        """Numbers of a token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Numbers of a token's keys in one layer; its values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def feed_forward(self) -> int:
        """Width of what one token passes through: its experts side by side, and the shared one."""
        return self.inner * max(1, self.experts_per_token) + self.shared_inner

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear modules of one layer, by transformers' names: (inputs, outputs). Experts are no modules of one."""
        h, attention = self.hidden, self.query
        table = {"q_proj": (h, attention), "k_proj": (h, self.key), "v_proj": (h, self.key), "o_proj": (attention, h)}
        inner = self.shared_inner if self.experts else self.inner
        feed = {"gate_proj": (h, inner), "up_proj": (h, inner), "down_proj": (inner, h)}
        return {**table, **feed} if inner else table

    @property
    def layer(self) -> int:
        """Weights of one layer: its matrices, its experts with their router, two norms."""
        matrices = sum(inputs * outputs for inputs, outputs in self.linears().values())
        return matrices + self.experts * (3 * self.hidden * self.inner + self.hidden) + 2 * self.hidden

    @property
    def active(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        idle = max(0, self.experts - self.experts_per_token)
        return self.layer - idle * 3 * self.hidden * self.inner

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many, or is the same."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Weights outside of the layers: embedding, head, last norm."""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.layer + self.root


GATED = ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3")


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None for one that is not understood.

    A feed-forward with a gate is told by its activation, SiLU (or Gemma's GELU): older families have none. Where none
    is said, it is that of the family.
    """
    family = str(config.get("model_type"))
    activation = config.get("hidden_act", "silu" if family in GATED else None)
    gated = activation in ("silu", "swish") or family.startswith("gemma")
    if not gated or any(config.get(other) for other in OTHER_SHAPES) or _mixed(config):
        return None
    tied = config.get("tie_word_embeddings")
    try:
        shape = Shape(
            tied=family.startswith(TIED) if tied is None else bool(tied),
            attention=_attention(config, family),
            positions=_positions(config),
            cut_by_tensor=family in CUT,
            **_dense(config),
            **_experts(config),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return shape if min(shape.layers, shape.hidden, shape.inner, shape.query, shape.key, shape.vocabulary) > 0 else None


def _mixed(config: Mapping[str, Any]) -> bool:
    """Are there layers of another kind than attention?"""
    kinds = config.get("layer_types")
    return isinstance(kinds, list) and not LAYER_TYPES.issuperset(map(str, kinds))


def _attention(config: Mapping[str, Any], family: str) -> str:
    """See ``train.attention``: the varlen kernel knows no dropout, and neither it nor sdpa soft caps and sinks."""
    if config.get("attn_logit_softcapping") or family == "gpt_oss":
        return "eager"
    return "sdpa" if config.get("attention_dropout") else "flash"


def _positions(config: Mapping[str, Any]) -> int:
    """0 also where rotary positions are scaled: families differ in whether the number is from before that."""
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rules = [said, *said.values()] if isinstance(said, dict) else []
    scaled = any(isinstance(rule, dict) and rule.get("factor") for rule in rules)
    return 0 if scaled else int(config.get("max_position_embeddings") or 0)


def _dense(config: Mapping[str, Any]) -> dict[str, int]:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return {
        "layers": int(config["num_hidden_layers"]),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocabulary": int(config["vocab_size"]),
    }


def _experts(config: Mapping[str, Any]) -> dict[str, int]:
    """An expert is as wide as moe_intermediate_size where it is said (Qwen), else as intermediate_size (Mixtral)."""
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if not experts:
        return {"inner": int(config["intermediate_size"])}
    if int(config.get("decoder_sparse_step") or 1) != 1:
        raise ValueError("dense layers between those with experts")
    own = config.get("moe_intermediate_size")
    if own is None and not config.get("num_local_experts"):  # Qwen's name of their number, without their width
        raise KeyError("moe_intermediate_size")
    return {
        "inner": int(config["intermediate_size"] if own is None else own),
        "experts": experts,
        "experts_per_token": int(config["num_experts_per_tok"]),
        "shared_inner": int(config.get("shared_expert_intermediate_size") or 0),
    }


def read_shape(folder: str) -> Shape | None:
    """The shape of the model in ``folder``; None where no config.json can be read there.

    A path that begins with ~ or $ is not followed: a Plan must not depend on whose home or environment it is made in.
    """
    if folder.startswith(("~", "$")):
        return None
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return shape_of(config) if isinstance(config, dict) else None
