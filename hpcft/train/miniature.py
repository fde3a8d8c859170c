"""A model in miniature with random weights on disk, and made-up windows for it: what strategies are compared on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcft.data.kinds import Kind

VOCABULARY = 96  # of the windows; a model's may be larger, and one that no tensor degree divides hides nothing
HEADS = 8
LONGEST = 24  # tokens of a window, about

# What makes a configuration small, where it has the key at all. Experts keep their kind and lose their number.
SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY + 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
# What follows from the sizes of the large model, or names its tokens: the family's defaults fit the small one.
FORGOTTEN = {
    *("rope_scaling", "rope_parameters", "layer_types", "mlp_layer_types", "quantization_config", "auto_map"),
    *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "model_type"),
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrunk(config: Any, tensor_degree: int = 1) -> Any:
    """``config`` (of transformers) with hidden 64, 2 layers, 8 heads; queries share keys where they did before.

    Raises whatever its class raises for sizes that it does not take.
    """
    config = config.get_text_config()
    values = {key: value for key, value in config.to_dict().items() if key not in FORGOTTEN}
    sizes = {key: size for key, size in SIZES.items() if values.get(key) is not None}
    heads = max(HEADS, tensor_degree)
    shared = values.get("num_key_value_heads") or values["num_attention_heads"]
    keys = max(HEADS // 2, tensor_degree) if shared < values["num_attention_heads"] else heads
    return type(config)(**{**values, **sizes, **TOKENS, "num_attention_heads": heads, "num_key_value_heads": keys})


def save(config: Any, folder: Path) -> Path:
    """``folder`` with a random float32 model of ``config``: configuration and safetensors."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stir(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Numbers that a mistake would show in: biases and norms off their neutral values, matrices of some weight."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        elif "embed" not in name:
            parameter.mul_(3.0)


@dataclass
class Window:
    """As ``protocols.Window``."""

    tokens: np.ndarray
    trained: np.ndarray
    documents: list[int]
    kinds: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kinds = self.kinds or [Kind.CHAT] * len(self.documents)
        self.margins = self.margins or [0.0] * len(self.documents)


class Windows(list):
    """As ``protocols.Windows``."""

    def count(self, index: int, kinds: Collection[int]) -> int:  # type: ignore[override]
        return sum(kind in kinds for kind in self[index].kinds)

    def trained_tokens(self, index: int) -> int:
        return int(self[index].trained.sum())


@dataclass
class Prepared:
    """As what ``data.shards`` opens."""

    train: Windows
    validation: Windows | None = None
    content: str = "0123456789abcdef"
    classes: tuple[str, ...] = ()


def windows(count: int, length: int = LONGEST, seed: int = 0) -> Windows:
    """``count`` windows of one to three documents of uneven lengths, unevenly masked."""
    draw = np.random.default_rng(seed)
    return Windows(window(draw, length) for _ in range(count))


def window(draw: np.random.Generator, length: int) -> Window:
    """One of them; at least one of its tokens is trained."""
    documents = [int(n) for n in draw.integers(4, length // 3 + 1, size=draw.integers(1, 4))]
    tokens = draw.integers(0, VOCABULARY, size=sum(documents)).astype(np.int32)
    trained = draw.random(len(tokens)) < draw.uniform(0.2, 0.9)
    starts = np.cumsum([0, *documents[:-1]])
    trained[starts] = False
    trained[starts[0] + 1] = True
    return Window(tokens, trained, documents)


def of_family(load: Callable[[], Any], folder: Path, tensor_degree: int = 1) -> tuple[str, str]:
    """Save a miniature of the model whose configuration ``load`` reads: its family, and why it is another's if so."""
    from transformers import Qwen2Config

    try:
        config = shrunk(load(), tensor_degree)
        save(config, folder)
        return str(config.model_type), ""
    except Exception as error:  # a class may refuse small sizes in any way; Qwen2's does not
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        config = shrunk(Qwen2Config(tie_word_embeddings=True), tensor_degree)
        save(config, folder)
        return str(config.model_type), why
