"""A model that also knows images is trained on text: its layers are found, and what no text goes through stays."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed  # imported once here, not in every forked rank
import pytest
import torch
import transformers
from torch import nn

from hpcft.errors import Refusal
from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, miniature, world
from hpcft.train.equivalence import difference
from hpcft.train.signals import Signals
from hpcft.train.skeleton import layers_of
from tests.train import families, small
from tests.train.equivalence import TOLERANCE, trained

PREPARED = small.Prepared(small.windows(22))
SPREAD: dict[str, tuple[str, dict[str, int]]] = {
    "ddp": ("ddp", {"dp": 2}),
    "fsdp": ("fsdp", {"dp": 2}),
    "zero2": ("zero2", {"dp": 2}),
    "zero3": ("zero3", {"dp": 2}),
}
IMAGES = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
assert deepspeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two layers and an encoder of images."""
    sizes = {**families.SIZES, "head_dim": 16, "sliding_window": 16}
    marks = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    config = transformers.Gemma3Config(
        text_config=sizes,
        vision_config={"hidden_size": 32, "intermediate_size": 64, **IMAGES},
        mm_tokens_per_image=4,
        **marks,
    )
    return miniature.save(config, tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "lora"), ("zero3", "full")])
def test_its_text_is_trained_alike_on_every_strategy(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    alone = trained(families.plan_for(folder, "one process", kind), tmp_path / "alone", PREPARED)
    found = trained(families.plan_with(folder, *SPREAD[name], kind), tmp_path / "together", PREPARED)
    assert difference(found, alone) < TOLERANCE


def moved(plan: Plan, root: Path) -> list[list[str]]:
    """On each rank: the parts of parameters whose numbers changed in a run, and those whose numbers did not."""
    run = assemble.assemble(plan, RunPaths(root), world.join(plan), Signals(), os.environ, prepared=PREPARED)

    def numbers() -> dict[str, torch.Tensor]:
        held = [shard for shard in run.sharded.shards() if shard.part == "master" and shard.tensor.numel()]
        return {f"{shard.name} {i}": shard.tensor.detach().clone() for i, shard in enumerate(held)}

    before = numbers()
    loop.train(run)
    run.world.barrier()
    run.metrics.close()
    after = numbers()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return [changed, [name for name in before if name not in changed]]


def of_images(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name


@pytest.mark.parametrize(("name", "kind"), [*((name, "full") for name in SPREAD), ("fsdp", "lora")])
def test_what_no_text_goes_through_does_not_decay(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    plan = families.plan_with(folder, *SPREAD[name], kind, optim={"weight_decay": 0.5})
    ranks = small.on_ranks(2, moved, plan, tmp_path)
    for changed, _ in ranks:
        assert changed
        assert not any(of_images(name) for name in changed)
    beside = any(of_images(name) for _, kept in ranks for name in kept)
    assert beside == (kind == "full"), "adapters that no text would train are not made"


def test_a_model_without_a_list_of_layers_is_refused_by_its_name() -> None:
    body = nn.Sequential(nn.Linear(2, 2))
    stranger: Any = SimpleNamespace(base_model_prefix="body", body=body)
    with pytest.raises(Refusal, match="layers of SimpleNamespace are not found: its Sequential has no list"):
        layers_of(stranger)
