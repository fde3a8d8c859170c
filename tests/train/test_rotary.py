"""A text's factors do not depend on what it shares a micro batch with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hpcft.train import miniature
from hpcft.train import model as models
from hpcft.train.strategies import ddp
from hpcft.train.world import World
from tests.train import families

ORIGINAL = 16  # tokens that the model first was trained on
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "Phi3Config",
        {
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            **{"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL},
        },
    ),
    "dynamic": ("LlamaConfig", {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC}),
    "default": ("LlamaConfig", {}),
}


def saved(folder: Path, kind: str) -> Path:
    name, particular = KINDS[kind]
    # A copy: configurations write into what they are given.
    return miniature.save(getattr(transformers, name)(**{**families.SIZES, **copy.deepcopy(particular)}), folder)


def ours(folder: Path, max_length: int, tuning: str = "full") -> Any:
    plan = families.plan_for(folder, "one process", tuning, data={"max_length": max_length})
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    return ddp.build(models.prepare_model(plan, here), plan, here).model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None], use_cache=False).logits


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("max_length", [ORIGINAL, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_text_is_read_alike_before_beside_and_after_long_ones(
    kind: str, max_length: int, tuning: str, tmp_path: Path
) -> None:
    model, tokens = ours(saved(tmp_path, kind), max_length, tuning), torch.arange(3, 3 + max_length)[None]
    before = logits(model, tokens[:, :8])
    padded = logits(model, tokens)[:, :8]
    after = logits(model, tokens[:, :8])
    assert torch.equal(before, after)
    assert torch.allclose(before, padded, atol=1e-5)


@pytest.mark.parametrize("max_length", [ORIGINAL, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_max_length_is_read_as_by_the_model_of_transformers(
    kind: str, max_length: int, tmp_path: Path
) -> None:
    tokens, folder = torch.arange(3, 3 + max_length)[None], saved(tmp_path, kind)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(logits(ours(folder, max_length), tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)


def test_it_is_said_once_and_the_configuration_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ours(saved(tmp_path, "longrope"), 40)
    assert capsys.readouterr().err.count("longrope factors as for texts of 40 tokens") == 1
    assert model.config.rope_parameters["rope_type"] == "longrope"
    ours(saved(tmp_path, "default"), 40)
    assert "rope" not in capsys.readouterr().err


def test_a_family_that_reckons_with_lengths_itself_is_warned_of_where_it_matters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scales = {**copy.deepcopy(LONG), "short_mscale": 1.1, "long_mscale": 1.3}
    config = transformers.PhimoeConfig(**families.SIZES, num_local_experts=2, rope_parameters=scales)
    folder = miniature.save(config, tmp_path)
    ours(folder, ORIGINAL)
    assert "WARNING: rope" not in capsys.readouterr().err
    ours(folder, 40)
    assert capsys.readouterr().err.count("WARNING: rope: this model's longrope factors follow") == 1
