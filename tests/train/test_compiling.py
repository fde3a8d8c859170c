"""Compiled layers: the same numbers, one program for all layers, and few shapes to compile for."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

from hpcft.train import adamw, compiling, cross_entropy, reduce_scatter
from hpcft.train.attention import document_bounds
from hpcft.train.batches import collate
from hpcft.train.compiling import compile_layers
from hpcft.train.model import prepare_model
from hpcft.train.modes import give_factors, repeats_itself
from hpcft.train.scores import document_scores
from hpcft.train.shared_inputs import Member
from hpcft.train.skeleton import layers_of
from hpcft.train.strategies import ddp
from hpcft.train.world import World
from tests.train import families, small
from tests.train import test_objectives as objectives
from tests.train.equivalence import TOLERANCE, Curve, difference, trained

PREPARED = small.Prepared(small.windows(22))
TRACED = "aot_eager"  # everything but the kernels that need a C++ compiler


@pytest.fixture(autouse=True)
def own_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays compiled for other tests; some masters of these small models are large."""
    for module, *names in (
        (cross_entropy, "_numbers", "_gradient"), (adamw, "_update", "_compiled_for"), (reduce_scatter, "_add"),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(adamw, "LARGE", 512)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layout", "kind", "level", "backend"),
    [
        ("one process", "lora", "full", TRACED),
        ("FSDP2", "full", "none", TRACED),
        ("FSDP2", "lora", "none", TRACED),  # its adapters share inputs
        ("TP", "lora", "none", TRACED),
        *(
            pytest.param(layout, kind, level, "inductor", marks=pytest.mark.campaign)
            for layout in ("one process", "DDP", "FSDP2", "HSDP", "ZeRO-2", "TP", "FSDP2×TP")
            for kind, level in (("full", "none"), ("lora", "full"))
        ),
    ],
)
def test_compiled_layers_give_the_same_losses_and_gradient_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, kind: str, level: str, backend: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiling, "_hindrance", lambda device: "")  # or nothing would be compared with nothing
    model = families.save(tmp_path / "model", "llama")

    def curve(compiled: bool) -> Curve:
        plan = families.plan_for(model, layout, kind, train={"compiled": compiled, "recomputation": level})
        return trained(plan, tmp_path / str(compiled), PREPARED)

    assert difference(curve(True), curve(False)) < TOLERANCE


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("FSDP2", "dpo lora"),
        ("TP", "dpo lora"),
        ("DDP", "dpo full"),
        *(
            pytest.param(layout, name, marks=pytest.mark.campaign)
            for layout in ("DDP", "FSDP2", "ZeRO-2", "TP")
            for name in ("dpo lora", "dpo full", "kto lora", "kto full")
        ),
    ],
)
def test_compiled_layers_have_the_same_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=TRACED))
    monkeypatch.setattr(compiling, "_hindrance", lambda device: "")
    model = families.save(tmp_path / "model", "llama")

    def curve(compiled: bool) -> Curve:
        root, changes = tmp_path / str(compiled), {"compiled": compiled, "recomputation": "full"}
        return trained(
            objectives.run(name, model, *objectives.LAYOUTS[layout], train=changes), root, objectives.prepared(name)
        )

    assert difference(curve(True), curve(False)) < TOLERANCE
    lines = [objectives.metrics(tmp_path / compiled) for compiled in ("True", "False")]
    assert len(lines[0]) == len(lines[1]) > 0
    for ours, theirs in zip(*lines, strict=True):
        for name, number in theirs.items():
            if "accurac" not in name:  # of the first step, before any reward differs from nothing, they are rounding
                assert ours[name] == pytest.approx(number, abs=1e-4), name


def test_the_arithmetic_of_loss_and_optimizer_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cross_entropy._numbers, cross_entropy._gradient, adamw._update, reduce_scatter._add
    assert compile_layers(made(layers=1), ALONE)
    now = cross_entropy._numbers, cross_entropy._gradient, adamw._update, reduce_scatter._add
    assert not any(a is b for a, b in zip(plain, now, strict=True))
    assert adamw._compiled_for == "cpu"


def test_all_layers_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend(TRACED)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = made(layers=6)
    assert compile_layers(model, ALONE)
    for step in range(3):
        batch = batch_of(2 * step, 2 * step + 1)
        model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits.sum().backward()
    assert len(layers_of(model)) == 6
    assert counter.frame_count == 2, "the smallest one, by which it is seen that programs can be made, and theirs"


def test_layers_whose_adapters_share_inputs_share_a_program_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend(TRACED)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    plan = small.tiny(model, 1, tuner={"kind": "lora", "rank": 4, "alpha": 8.0})
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    adapted = ddp.build(prepare_model(plan, here), plan, here).model
    joined = {module.joined for module in adapted.modules() if isinstance(module, Member)}
    assert compile_layers(adapted, here)
    for step in range(3):
        batch = batch_of(2 * step, 2 * step + 1)
        adapted(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits.sum().backward()
    assert counter.frame_count == 3, "the smallest one, the first layer's, whose input learns nothing, and the others'"
    assert all(sum("linear" in str(node.target) for node in g.graph.nodes) == 7 + 4 + 7 for g in counter.graphs[1:])
    assert len(joined) == 4
    assert all(j.input is None for j in joined)


def test_other_documents_need_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend(TRACED)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))

    def told(module: Any, query: Any, key: Any, value: Any, mask: Any, **of: Any) -> Any:
        return seen(query, of["cu_seq_lens_q"], of["max_length_q"]).transpose(1, 2), None

    AttentionInterface.register("told", told)
    model = made(layers=2)
    model.set_attn_implementation("told")
    assert compile_layers(model, ALONE)
    with torch.no_grad():
        for bounds, longest in (([0, 3, 64], 61), ([0, 30, 40, 64], 30), ([0, 64], 64)):
            starts = torch.tensor(bounds, dtype=torch.int32)
            model(input_ids=torch.ones(1, 64, dtype=torch.int64), use_cache=False,
                  cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)  # fmt: skip
    assert counter.frame_count == 2
    assert LONGEST == [61, 61, 30, 30, 64, 64]


LONGEST: list[int] = []
ALONE = cast(
    "World",
    SimpleNamespace(device=torch.device("cpu"), first=True, gather_text=lambda text: [text], max=lambda row: row),
)


@library.custom_op("hpcft_tests::told", mutates_args=())
def seen(query: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
    LONGEST.append(longest)
    return query + starts[-1]


@seen.register_fake
def _(query: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.empty_like(query)


def test_where_nothing_can_be_compiled_layers_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*ignored: Any, **also: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch, "compile", lambda made, **how: no_compiler)
    model = made(layers=2)
    assert not compile_layers(model, ALONE)
    assert "nothing is compiled here, which is slower: rank 0: Failed to find C compiler." in capsys.readouterr().err
    batch = batch_of(0)
    assert model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits.isfinite().all()


def test_batches_for_compiled_layers_have_one_length_and_documents_in_powers_of_two() -> None:
    batches = [batch_of(0), batch_of(1, 2), batch_of(3)]
    assert {batch.tokens.shape[1] for batch in batches} == {64}
    for batch in batches:
        starts, longest = document_bounds(batch)
        own = [0]
        for length in (n for row in batch.lengths for n in row):
            own.append(own[-1] + length)
        assert starts[: len(own)] == own
        assert set(starts[len(own) :]) == {batch.tokens.numel()}, "what follows is empty"
        assert (len(starts), longest) == (64, batch.tokens.numel())


def test_many_documents_and_long_ones_get_the_next_power_of_two() -> None:
    batch = batch_of(0)
    batch.lengths = [[1500, *[3] * 70]]
    starts, longest = document_bounds(batch)
    assert (len(starts), longest, starts[-1]) == (128, 1710, 1710)
    batch.lengths = [[1500, *[3] * 300]]
    assert document_bounds(batch)[1] == 2048


def test_without_compiling_bounds_are_what_they_are() -> None:
    batch = collate(PREPARED.train[:1], packed=True)
    starts, longest = document_bounds(batch)
    assert len(starts) == len(batch.lengths[0]) + 1
    assert longest == max(batch.lengths[0])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_before_the_first_step_compiled_layers_say_of_policy_and_reference_the_same_to_the_bit(dropout: float) -> None:
    if why := compiling._hindrance(torch.device("cpu")):
        pytest.skip(f"no compiler: {why}")
    torch._dynamo.reset()
    model = adapted(dropout)
    assert compile_layers(model, ALONE)
    give_factors(model, torch.device("cpu"))
    document_scores(model, batch_of(0, 1))
    torch._dynamo.utils.counters.clear()
    scores = document_scores(model, batch_of(0, 1), reference=True)
    assert scores.reference is not None
    assert scores.policy.tolist() == scores.reference.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "the loss's, without a gradient; no layer's"
    assert not scores.reference.requires_grad
    scores.policy.sum().backward()
    learned = {name: p.grad.abs().sum() for name, p in model.named_parameters() if p.grad is not None}
    assert all(learned[name] > 0 for name in learned if "lora_B" in name), "their factor is back"


def test_a_reference_does_not_know_what_adapters_have_learned() -> None:
    batch, model = batch_of(0, 1), adapted(0.0)
    start = document_scores(model, batch).policy.tolist()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    give_factors(model, torch.device("cpu"))
    scores = document_scores(model, batch, reference=True)
    assert scores.reference is not None
    assert scores.reference.tolist() == start
    assert scores.policy.tolist() != start


def test_a_model_that_draws_numbers_of_its_own_is_found_out_and_adapters_that_drop_are_not_meant() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, PhimoeConfig

    sizes = {**families.SIZES, "num_local_experts": 4}
    torch.manual_seed(0)
    drops = AutoModelForCausalLM.from_config(LlamaConfig(**families.SIZES, attention_dropout=0.5))
    samples = AutoModelForCausalLM.from_config(PhimoeConfig(**sizes))
    for parameter in samples.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    drop = adapted(0.5)
    before = torch.get_rng_state()
    for model, same in ((drop, True), (drops.train(), False), (samples.train(), False)):
        assert repeats_itself(model, ALONE) is same
        assert model.training
    assert torch.get_rng_state().equal(before)


def adapted(dropout: float) -> Any:
    """In bfloat16, which is rounded often."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(made(layers=3).to(torch.bfloat16), config, autocast_adapter_dtype=False).train()


def batch_of(*windows: int) -> Any:
    return collate([PREPARED.train[w] for w in windows], packed=True, multiple=64, few_shapes=True)


def made(layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**families.SIZES, "num_hidden_layers": layers})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)
