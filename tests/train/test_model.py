"""A model that was built empty and filled is the model that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hpcft.plan.plan import Plan
from hpcft.train import model as models
from hpcft.train.strategies import ddp
from hpcft.train.world import World
from tests.train import families, small

SMALL: dict[str, Any] = {
    **{"vocab_size": small.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16},
}
# A router with a bias that is no parameter; single numbers, without a dimension, that are none; no such thing.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "Glm4MoeConfig",
        {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "apertus": ("ApertusConfig", {}),
    "llama": ("LlamaConfig", {}),
}


def saved(folder: Path, kind: str) -> Path:
    """A random model whose buffers are not what its constructor makes them."""
    name, particular = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**SMALL, **particular), dtype=torch.float32)
    for buffer in models.saved_buffers(model).values():
        buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return folder


def filled(plan: Plan) -> Any:
    """The model of a rank that is alone."""
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    return ddp.build(models.prepare_model(plan, here), plan, here).model


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_the_model_that_transformers_loads(tmp_path: Path, kind: str, tuning: str) -> None:
    folder = saved(tmp_path, kind)
    tokens = torch.arange(12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=tokens).logits
    ours = filled(families.plan_for(folder, "one process", tuning)).eval()(input_ids=tokens).logits
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
