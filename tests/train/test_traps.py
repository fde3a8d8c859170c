"""Ways to compute something else without an error, and the test that holds each.

S1   packed, with the cache on (the configuration's default)   here; a row's loss in test_batches.py
S2   packed, with a mask, though it be all ones                here; the packing check at start in test_batches.py
S3   tied weights that a strategy unties                       here
S4   frozen norms that begin to train                          here
S5   gradients that are parts of a sum (norms, biases)         here: norms of queries and keys, and the gradient norm
S6   hooks that a sharded parameter loses                      here, the same two under FSDP
S7   data parallel that leaves tensor parallel norms alone     here, the gradient norm of DDP×TP
S8   first weights with torch's scale and not the model's      here, for every strategy
S9   masks of zeros from a template without marks              tests/data/test_masks.py: masks are rendered prefixes;
                                                               test_prepare.py: nothing to train on is refused
S10  kernels that find documents in one row only               here
S11  4-bit weights that a CPU repacks when not in training     with the tests of quantised bases
S12  losses that differ between releases                       no test holds a loss: they compare runs with runs
S13  a checkpoint overwritten in place                         test_checkpoint.py: the same step again, leftovers
     pickles                                                   here for every strategy; test_checkpoint.py
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed  # imported once here, not in every forked rank
import pytest
import torch
from transformers import AutoModelForCausalLM

from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, attention, loop, world
from hpcft.train.equivalence import difference
from hpcft.train.model import load_config, prepare_model
from hpcft.train.signals import Signals
from tests.train import families, small
from tests.train.equivalence import TOLERANCE, train, trained

PREPARED = small.Prepared(small.windows(22))
assert deepspeed

# On two ranks, so that a test of each takes a second or two.
SPREAD: dict[str, tuple[str, dict[str, int]]] = {
    "ddp": ("ddp", {"dp": 2}),
    "zero1": ("zero1", {"dp": 2}),
    "zero2": ("zero2", {"dp": 2}),
    "zero3": ("zero3", {"dp": 2}),
    "zero3_offload": ("zero3_offload", {"dp": 2}),
    "fsdp": ("fsdp", {"dp": 2}),
    "tp": ("ddp", {"dp": 1, "tp": 2}),
    "fsdp of tp": ("fsdp", {"dp": 1, "tp": 2}),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def assembled(plan: Plan, root: Path) -> Any:
    """On each rank: the run, about to begin."""
    return assemble.assemble(plan, RunPaths(root), world.join(plan), Signals(), os.environ, prepared=PREPARED)


def watched(plan: Plan, root: Path, look: Callable[[Any], None]) -> Any:
    """On each rank: the run at its end; ``look(run)`` was called in every step, its gradients reduced."""
    run = assembled(plan, root)
    reduce = run.sharded.reduce

    def reduced() -> None:
        reduce()
        look(run)

    run.sharded.reduce = reduced
    loop.train(run)
    run.world.barrier()
    run.metrics.close()
    return run


def saved(folder: Path, family: str) -> Path:
    place = folder / family
    return place if place.is_dir() else families.save(place, family)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_cache_is_off_whatever_the_models_configuration_says(kind: str, folder: Path) -> None:
    plan = families.plan_for(saved(folder, "qwen2"), "one process", kind)
    assert '"use_cache": true' in (folder / "qwen2" / "config.json").read_text()
    here = world.join(plan, small.environment(0, 1, 0))
    assert not prepare_model(plan, here).model.config.use_cache


def test_a_cache_in_the_configuration_or_a_mask_of_ones_would_let_documents_see_each_other(folder: Path) -> None:
    """Why the two tests around this one are there."""
    config = load_config(families.plan_for(saved(folder, "llama"), "one process").model)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", config=config, attn_implementation="sdpa")
    tokens = torch.arange(1, 17)[None]
    positions = torch.cat([torch.arange(8), torch.arange(8)])[None]

    def last(tokens: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        return model(input_ids=tokens, position_ids=positions, **options).logits[0, -1].detach()

    alone = last(tokens[:, 8:], positions[:, 8:])
    assert torch.allclose(last(tokens, positions), alone, atol=1e-5)
    leaks = [last(tokens, positions, use_cache=True), last(tokens, positions, attention_mask=torch.ones_like(tokens))]
    assert not any(torch.allclose(leak, alone, atol=1e-3) for leak in leaks)


def arguments(plan: Plan, root: Path) -> list[Any]:
    """How often the batch went through the body of the model, with which masks, and how many positions are 0."""
    seen: list[Any] = []
    run = assembled(plan, root)
    body = run.sharded.model.model
    body.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = next(next(run.steps).micros).batch
    run.objective.loss(run.sharded.model, batch)
    calls = [kwargs for kwargs in seen if kwargs.get("position_ids") is batch.positions]
    return [len(calls), [kwargs.get("attention_mask") for kwargs in calls], int((batch.positions == 0).sum())]


def test_a_packed_batch_comes_with_positions_that_restart_and_without_a_mask(folder: Path, tmp_path: Path) -> None:
    plan = families.plan_for(saved(folder, "llama"), "one process")
    [[calls, masks, starts]] = small.on_ranks(1, arguments, plan, tmp_path)
    assert calls >= 1
    assert masks == [None] * calls
    assert starts > plan.batch.micro_windows


def test_kernels_are_told_the_documents_of_every_row() -> None:
    rows: Any = SimpleNamespace(
        packed=True, lengths=[[3, 5], [8]], tokens=SimpleNamespace(device=torch.device("meta")), few_shapes=False
    )
    told = attention.document_arguments(rows)
    assert (told["cu_seq_lens_q"].shape, told["max_length_q"]) == ((4,), 8)
    assert set(told) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


@pytest.mark.parametrize(
    ("name", "able"), [("", set()), ("_grouped", {"grouped"}), ("_grouped_cudnn", {"grouped", "cudnn"})]
)
def test_every_rank_makes_use_of_what_the_name_of_the_attention_says(name: str, able: set[str]) -> None:
    attention.register_varlen(f"{attention.VARLEN}{name}")
    assert attention.ABLE - {""} == able
    attention.register_varlen(attention.VARLEN)


def test_a_kernel_for_few_shapes_is_not_taken_where_shapes_are_many() -> None:
    assert attention.for_any_shape("hpcft_varlen_grouped_cudnn") == "hpcft_varlen_grouped"
    assert attention.for_any_shape("hpcft_varlen") == "hpcft_varlen"
    assert attention.for_any_shape("sdpa") == "sdpa"


def test_rows_of_one_document_each_are_told_of_no_documents() -> None:
    rows: Any = SimpleNamespace(
        packed=True, lengths=[[8], [8]], tokens=SimpleNamespace(device=torch.device("meta")), few_shapes=True
    )
    assert attention.document_arguments(rows) == {}


def tied(plan: Plan, root: Path) -> list[bool]:
    """On each rank: are embedding and head one parameter, before the run and after it?"""
    found = []

    def look(run: Any) -> None:
        base = run.sharded.skeleton.model
        found.append(base.get_input_embeddings().weight is base.get_output_embeddings().weight)

    watched(plan, root, look)
    return found


@pytest.mark.parametrize("name", ["tp", "fsdp of tp", "fsdp", "zero3"])
def test_tied_weights_stay_tied(name: str, folder: Path, tmp_path: Path) -> None:
    plan = families.plan_with(saved(folder, "qwen2"), *SPREAD[name])
    assert small.on_ranks(2, tied, plan, tmp_path) == [[True] * 3] * 2


def frozen(plan: Plan, root: Path) -> list[list[Any]]:
    """On each rank: the names that train, and the frozen numbers that changed during the run."""
    before: dict[str, torch.Tensor] = {}
    trains: list[str] = []
    changed: list[str] = []

    def look(run: Any) -> None:
        for name, parameter in run.sharded.skeleton.model.named_parameters():
            now = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad:
                trains.append(name)
            elif not torch.equal(before.setdefault(name, now.detach().clone()), now.detach()):
                changed.append(name)

    watched(plan, root, look)
    return [sorted(set(trains)), changed]


@pytest.mark.parametrize("name", ["tp", "fsdp of tp", "fsdp"])
def test_with_lora_what_is_frozen_stays_so_and_norms_are(name: str, folder: Path, tmp_path: Path) -> None:
    plan = families.plan_with(saved(folder, "qwen3"), *SPREAD[name], "lora")
    for trains, changed in small.on_ranks(2, frozen, plan, tmp_path):
        assert trains
        assert all("lora_" in parameter for parameter in trains)
        assert changed == []


@pytest.mark.parametrize("name", ["tp", "fsdp of tp"])
def test_norms_on_queries_and_keys_learn_from_every_tensor_rank(name: str, folder: Path, tmp_path: Path) -> None:
    model = saved(folder, "qwen3")
    [alone] = small.on_ranks(1, weights_of_norms, families.plan_for(model, "one process"), tmp_path / "alone")
    plan = families.plan_with(model, *SPREAD[name])
    first, second = small.on_ranks(2, weights_of_norms, plan, tmp_path / "together")
    assert len(first) == 2 * 4 + 1  # of two layers, and the final one
    for parameter, numbers in first.items():
        assert numbers == second[parameter]
        assert numbers == pytest.approx(alone[parameter], rel=1e-4, abs=1e-6), parameter


def weights_of_norms(plan: Plan, root: Path) -> dict[str, list[float]]:
    """On each rank: every norm after the run."""
    run = watched(plan, root, lambda run: None)
    found: dict[str, list[float]] = {}
    for name, parameter in run.sharded.skeleton.model.named_parameters():
        if "norm" in name:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().double().tolist()
    return found


@pytest.mark.slow
def test_norms_on_queries_and_keys_keep_the_gradient_norm_on_a_mesh(folder: Path, tmp_path: Path) -> None:
    model = saved(folder, "qwen3")
    alone = trained(families.plan_for(model, "one process"), tmp_path / "alone", PREPARED)
    for layout in ("FSDP2×TP", "DDP×TP"):
        found = trained(families.plan_for(model, layout), tmp_path / layout, PREPARED)
        assert difference(found, alone) < TOLERANCE, layout


def first_weights(plan: Plan, root: Path) -> dict[str, list[float]]:
    """On each rank: of every matrix of a model from scratch the sum of squares and how many numbers are here."""
    run = assembled(plan, root)
    found: dict[str, list[float]] = {}
    for shard in run.sharded.shards():
        if shard.part == "master" and len(shard.shape) == 2:
            squares, count = found.get(shard.name, [0.0, 0.0])
            found[shard.name] = [squares + float(shard.tensor.double().square().sum()), count + shard.tensor.numel()]
    run.world.barrier()
    return found


@pytest.mark.parametrize("name", SPREAD)
def test_a_model_from_scratch_has_its_own_scale(name: str, model: Path, tmp_path: Path) -> None:
    plan = families.plan_with(model, *SPREAD[name], model={"from_scratch": True})
    ranks = small.on_ranks(2, first_weights, plan, tmp_path)
    names = set().union(*ranks)
    assert len(names) == 1 + 2 * 7  # the embedding, which is the head too; seven matrices of two layers
    for parameter in names:
        squares, count = (sum(rank.get(parameter, [0.0, 0.0])[i] for rank in ranks) for i in (0, 1))
        assert (squares / count) ** 0.5 == pytest.approx(0.02, rel=0.05), parameter


@pytest.mark.parametrize("name", SPREAD)
def test_no_pickle_is_written_or_read_by_a_save_and_a_resume(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pickle was used")

    for word in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, word, refuse)
    for word in ("load", "save"):
        monkeypatch.setattr(torch, word, refuse)
    plan = families.plan_with(
        model, *SPREAD[name], model={"from_scratch": True}, checkpoint={"save_steps": 2}, optim={"max_steps": 3}
    )
    small.on_ranks(2, train, plan, tmp_path, PREPARED)
    shutil.rmtree(RunPaths(tmp_path).checkpoint(3))
    small.on_ranks(2, train, plan, tmp_path, PREPARED, attempt=2)
    assert RunPaths(tmp_path).checkpoint(3).is_dir()
