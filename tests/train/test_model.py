"""A model that was built empty and filled is the model that transformers loads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hpcft.errors import Refusal
from hpcft.plan.modules import FAMILIES, modules_of
from hpcft.plan.plan import Plan
from hpcft.train import model as models
from hpcft.train import world
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


def without(folder: Path, gone: str) -> Path:
    """The folder's weights without the tensors that have ``gone`` in their name."""
    kept = {
        name: t for name, t in safetensors.torch.load_file(folder / "model.safetensors").items() if gone not in name
    }
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_reads_other_weights_than_rank_0_is_named(tmp_path: Path, strategy: str) -> None:
    model = saved(tmp_path / "model", "llama")
    other = shutil.copytree(model, tmp_path / "other")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5  # all else is the same
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})

    def rank() -> str:
        folder = other if os.environ["RANK"] == "1" else model
        mine = families.plan_with(folder, strategy, {"dp": 2}, "full")
        try:
            models.prepare_model(mine, world.join(mine, os.environ))
        except Refusal as refusal:
            return refusal.problems[0].what
        return ""

    assert set(small.on_ranks(2, rank)) == {"rank 1 loaded other weights than rank 0"}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    ("family", "gone"),
    [("llama", "layers.1."), ("llama", "lm_head"), ("phi", "layers.1.mlp.fc2.bias"), ("gemma", "norm.weight")],
)
def test_a_weight_that_the_files_lack_is_refused_by_name_and_never_random(
    tmp_path: Path, family: str, gone: str, tuning: str
) -> None:
    folder = without(families.save(tmp_path, family), gone)
    with pytest.raises(Refusal, match=rf"lack weights(.|\n)*{re.escape(gone)}"):
        filled(families.plan_for(folder, "one process", tuning))


def test_adapters_taken_out_of_the_weights_are_not_taken_out_of_random_ones(tmp_path: Path) -> None:
    folder = without(families.save(tmp_path, "phi"), "layers.0.self_attn.q_proj.weight")
    with pytest.raises(Refusal, match=r"model.layers.0.self_attn.q_proj.weight"):
        filled(families.plan_for(folder, "one process", "lora", tuner={"init_lora_weights": "pissa"}))


def test_a_head_of_scores_that_the_base_does_not_have_is_meant_to_be_new(tmp_path: Path) -> None:
    folder = families.save(tmp_path, "llama")
    changes: dict[str, Any] = {"train": {"objective": "rm"}, "tuner": {"init_lora_weights": "pissa"}}
    assert filled(families.plan_for(folder, "one process", "lora", **changes))


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    folder = families.save(tmp_path, "qwen2")
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    changes = {"tuner": {"init_lora_weights": "pissa"}}
    assert filled(families.plan_for(folder, "one process", "lora", **changes))


def test_pickled_weights_are_read_whole(tmp_path: Path) -> None:
    folder = families.save(tmp_path, "llama")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model = filled(families.plan_for(folder, "one process"))
    assert torch.equal(model.lm_head.weight.detach(), weights["lm_head.weight"])


def test_weights_of_another_shape_than_the_configuration_gives_are_refused(tmp_path: Path) -> None:
    config = json.loads((families.save(tmp_path, "llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(Refusal, match=r"6 tensors of its files have another shape(.|\n)*96(.|\n)*128"):
        filled(families.plan_for(tmp_path, "one process"))


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    file = families.save(tmp_path, "phi") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Refusal, match="its header tells of"):
        filled(families.plan_for(tmp_path, "one process"))


@pytest.mark.parametrize("kind", ["T5Config", "Qwen2VLConfig", "ViTConfig"])
def test_a_model_that_says_no_next_token_is_refused(tmp_path: Path, kind: str) -> None:
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"no decoder of text"):
        filled(families.plan_for(tmp_path, "one process", model={"from_scratch": True}))


def test_an_attention_whose_package_is_not_here_is_refused(tmp_path: Path) -> None:
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("kernels"):
        pytest.skip("it is here")
    plan = families.plan_for(families.save(tmp_path, "llama"), "one process", model={"attention": "flash_attention_2"})
    with pytest.raises(Refusal, match=r"FlashAttention2(.|\n)*attn_impl: auto"):
        filled(plan)


def test_names_that_no_module_has_are_refused_beside_names_that_one_has(tmp_path: Path) -> None:
    folder = families.save(tmp_path, "phi")
    names: dict[str, Any] = {"target_modules": ("q_proj", "qproj"), "modules_to_save": ("embed_tokens", "foo")}
    with pytest.raises(Refusal) as refused:
        filled(families.plan_for(folder, "one process", "lora", tuner=names))
    told = [(problem.what, problem.value, problem.hint) for problem in refused.value.problems]
    assert told == [
        ("tuner.target_modules: the model has no such module", "qproj", "did you mean q_proj?"),
        ("tuner.modules_to_save: the model has no such module", "foo", ""),
    ]
    assert "fc1" in refused.value.problems[0].choices


@pytest.mark.parametrize("targets", [("self_attn.q_proj", "model.layers.1.mlp.fc1"), ("all-linear",), ("lm_head",)])
def test_parts_of_paths_and_all_linear_are_names(tmp_path: Path, targets: tuple[str, ...]) -> None:
    folder = families.save(tmp_path, "phi")
    assert filled(families.plan_for(folder, "one process", "lora", tuner={"target_modules": targets}))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_that_a_plan_knows_of_a_family_are_those_of_transformers(family: str, scored: bool) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=1)
    with init_empty_weights():
        model = (AutoModelForSequenceClassification if scored else AutoModelForCausalLM).from_config(config)
    ours = set(modules_of({"model_type": family, "num_hidden_layers": 1}, scored))
    assert ours <= {name for name, _ in model.named_modules()}
    assert ours >= {name for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
