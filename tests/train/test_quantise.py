"""A base in 4 bits trains as one process does on every strategy that takes it, and nothing of it stays in full."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hpcft.errors import Refusal
from hpcft.plan.plan import Plan
from hpcft.run import manifest as manifests
from hpcft.run.paths import RunPaths
from hpcft.train import model as models
from hpcft.train import world
from hpcft.train.facts import check_facts
from hpcft.train.quantise import quantise_now
from hpcft.train.skeleton import Skeleton
from hpcft.train.strategies import ddp, fsdp
from hpcft.train.world import World
from tests.train import equivalence, families, small

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SPREAD: dict[str, tuple[str, dict[str, int]]] = {
    "DDP": ("ddp", {"dp": 2}),
    "FSDP2": ("fsdp", {"dp": 2}),
    "HSDP": ("fsdp", {"dp_replicate": 2, "dp": 2}),
    "FSDP2 offloaded": ("fsdp_offload", {"dp": 2}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("base") / "phi", "phi")  # every linear has a bias


@pytest.fixture(scope="module")
def prepared() -> small.Prepared:
    return small.Prepared(small.windows(22))


def plan_for(base: Path, strategy: str = "ddp", degrees: dict[str, int] | None = None, **changes: Any) -> Plan:
    model = {"path": str(base), "from_scratch": False, "quantization": "nf4", **changes.pop("model", {})}
    return families.plan_with(base, strategy, degrees or {"dp": 1}, "lora", model=model, **changes)


def built(plan: Plan) -> ddp.DataParallel:
    alone = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    return ddp.build(models.prepare_model(plan, alone), plan, alone)


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(torch.uint8).flatten()


ALONE: dict[tuple[str, str], equivalence.Curve] = {}


def alone(base: Path, prepared: small.Prepared, root: Path, dtype: str, tuner: dict[str, Any]) -> equivalence.Curve:
    """The curve of one process, trained once."""
    key = (dtype, str(tuner))
    if key not in ALONE:
        ALONE[key] = equivalence.trained(plan_for(base, model={"dtype": dtype}, tuner=tuner), root, prepared)
    return ALONE[key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", SPREAD)
def test_every_strategy_that_takes_it_gives_the_losses_and_norms_of_one_process(
    base: Path, prepared: small.Prepared, tmp_path: Path, spread: str, dtype: str
) -> None:
    one = alone(base, prepared, tmp_path / "one", dtype, {"kind": "lora"})
    plan = plan_for(base, *SPREAD[spread], model={"dtype": dtype})
    many = equivalence.trained(plan, tmp_path / "many", prepared)
    assert equivalence.difference(many, one) < TOLERANCE[dtype]


@pytest.mark.parametrize("spread", ["DDP", "FSDP2"])
@pytest.mark.parametrize(
    "tuner",
    [
        {"kind": "lora", "use_dora": True},
        {"kind": "lora", "bias": "all", "target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    ],
)
def test_what_is_trained_beside_adapters_is_trained_the_same_everywhere(
    base: Path, prepared: small.Prepared, tmp_path: Path, spread: str, tuner: dict[str, Any]
) -> None:
    for dtype, tolerance in TOLERANCE.items():
        one = alone(base, prepared, tmp_path / dtype / "one", dtype, tuner)
        plan = plan_for(base, *SPREAD[spread], model={"dtype": dtype}, tuner=tuner)
        many = equivalence.trained(plan, tmp_path / dtype / "many", prepared)
        assert equivalence.difference(many, one) < tolerance, dtype


@pytest.mark.parametrize(("first", "second"), [("DDP", "FSDP2"), ("FSDP2", "DDP")])
def test_saved_under_one_strategy_it_goes_on_under_the_other(
    base: Path, prepared: small.Prepared, tmp_path: Path, first: str, second: str
) -> None:
    saves = plan_for(base, *SPREAD[first], checkpoint={"save_steps": 1, "keep": 3})
    whole = equivalence.trained(saves, tmp_path / "first", prepared)
    resume = str(RunPaths(tmp_path / "first").checkpoint(1))
    goes_on = plan_for(base, *SPREAD[second], checkpoint={"resume": resume})
    rest = equivalence.trained(goes_on, tmp_path / "second", prepared)
    assert equivalence.difference(rest, whole[1:]) < TOLERANCE["float32"]


@pytest.mark.parametrize("spread", ["DDP", "FSDP2"])
def test_recomputation_changes_nothing(base: Path, prepared: small.Prepared, tmp_path: Path, spread: str) -> None:
    one = alone(base, prepared, tmp_path / "one", "float32", {"kind": "lora"})
    plan = plan_for(base, *SPREAD[spread], train={"recomputation": "full"})
    assert equivalence.difference(equivalence.trained(plan, tmp_path / "again", prepared), one) < TOLERANCE["float32"]


def test_it_learns(base: Path, tmp_path: Path) -> None:
    plan = plan_for(base, model={"dtype": "bfloat16"}, optim={"max_steps": 12, "learning_rate": 1e-2})
    curve = equivalence.trained(plan, tmp_path, small.Prepared(small.windows(8)))
    assert curve[-1][0] < curve[0][0] - 0.3


def test_half_a_byte_a_weight_stays_and_no_copy_of_it_in_full(base: Path) -> None:
    plan = plan_for(base, model={"dtype": "bfloat16"})
    sharded = built(plan)
    shapes, packs = sharded.skeleton.shapes, sharded.skeleton.packs
    frozen = {n: p for n, p in sharded.model.named_parameters() if not p.requires_grad}
    packed = sum(p.numel() * p.element_size() for n, p in frozen.items() if n in packs)
    assert packed == sum(shapes[n][0] * shapes[n][1] for n in packs) // 2
    whole = [n for n, p in frozen.items() if n not in packs and p.dim() == 2]
    assert [n.rpartition("model.")[2] for n in whole] == ["embed_tokens.weight", "lm_head.weight"]
    assert all(p.dtype is torch.bfloat16 for p in frozen.values())
    states = [m.quant_state for m in sharded.model.modules() if hasattr(m, "quant_state")]
    assert len(states) == len(packs)
    assert all(s.nested and s.quant_type == "nf4" and s.dtype is torch.bfloat16 for s in states)


def test_at_any_time_one_weight_is_there_in_full(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(base)
    read: list[tuple[str, int]] = []
    honest = Skeleton.read

    def watched(self: Any, name: str, out: torch.Tensor, offset: int = 0) -> None:
        read.append((name, sum(getattr(m, "quant_state", None) is not None for m in self.model.modules())))
        honest(self, name, out, offset)

    monkeypatch.setattr(Skeleton, "read", watched)
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    skeleton = models.prepare_model(plan, here)
    assert read == []
    assert all(p.is_meta for p in skeleton.model.parameters())
    skeleton.fill(torch.device("cpu"))
    order = [filled for name, filled in read if name in skeleton.packs]
    assert order == list(range(len(skeleton.packs))), "each was packed before the next was read"


def held(plan: Plan) -> list[int]:
    """On each rank: bytes of the packed weights that it keeps, and how many numbers those weights are in full."""
    here = world.join(plan, os.environ)
    sharded: Any = fsdp.build(models.prepare_model(plan, here), plan, here)
    mine = {name: p.to_local() for name, p in sharded.model.named_parameters() if name in sharded.skeleton.packs}
    whole = sum(math.prod(sharded.skeleton.shapes[name]) for name in mine)
    return [sum(p.numel() * p.element_size() for p in mine.values()), whole]


def test_under_fsdp_each_rank_keeps_its_part_of_the_bytes(base: Path) -> None:
    plan = plan_for(base, "fsdp", {"dp": 2}, model={"dtype": "bfloat16"})
    for kept, whole in small.on_ranks(2, held, plan):
        assert kept == whole // 4, "half a byte a weight, over two ranks"


def test_names_shapes_and_first_adapters_are_plain_loras(base: Path) -> None:
    plain, packed = built(plan_for(base, model={"quantization": "none"})), built(plan_for(base))
    assert plain.skeleton.shapes == packed.skeleton.shapes
    assert plain.slots.keys() == packed.slots.keys()
    for name, slot in plain.slots.items():
        assert torch.equal(slot.master, packed.slots[name].master), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_the_one_that_transformers_loads_in_four_bits(base: Path, dtype: str) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map="cpu")
    model = built(plan_for(base, model={"dtype": dtype, "attention": "sdpa"})).model
    ours, found = model.get_base_model(), 0
    for name, module in theirs.named_modules():
        if type(module).__name__ == "Linear4bit":
            own = ours.get_submodule(name).base_layer
            assert torch.equal(bits(module.weight), bits(own.weight)), name
            assert module.weight.quant_state == own.quant_state
            module.support_avx512bf16_for_cpu = False  # its other kernels round otherwise
            found += 1
    assert found == 12
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0.0, atol=0.0)


def test_evaluation_between_steps_leaves_gradients_as_they_are(base: Path) -> None:
    """On some CPUs bitsandbytes would repack the weights in the first evaluation; training then has no gradients."""
    sharded, ids = built(plan_for(base, model={"dtype": "bfloat16"})), torch.arange(30)[None]

    def gradients() -> list[torch.Tensor]:
        sharded.end_step(False)
        sharded.backward(sharded.model(input_ids=ids).logits.float().square().mean(), last=True)
        return [slot.grad.clone() for slot in sharded.slots.values()]

    before = gradients()
    sharded.model.eval()
    with torch.no_grad():
        sharded.model(input_ids=ids)
    sharded.model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert any(bool(g.any()) for g in before)


def test_a_run_goes_on_with_the_base_it_began_with(base: Path, prepared: small.Prepared, tmp_path: Path) -> None:
    plan = plan_for(base, checkpoint={"save_steps": 1})
    equivalence.trained(plan, tmp_path, prepared)
    manifest = manifests.read(RunPaths(tmp_path).checkpoint(3))
    check_facts(manifest, plan, prepared.content)
    whole = dataclasses.replace(plan, model=dataclasses.replace(plan.model, quantization="none"))
    with pytest.raises(Refusal, match=r"model\.quantization: 'nf4' then, 'none' now"):
        check_facts(manifest, whole, prepared.content)
    facts = {**manifest.facts, "model": {k: v for k, v in manifest.facts["model"].items() if k != "quantization"}}
    older = dataclasses.replace(manifest, facts=facts)  # of a release that did not quantise
    check_facts(older, whole, prepared.content)
    with pytest.raises(Refusal, match=r"model\.quantization: 'none' then, 'nf4' now"):
        check_facts(older, plan, prepared.content)


def test_without_bitsandbytes_it_is_refused_with_the_command(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Refusal, match="needs bitsandbytes") as refusal:
        built(plan_for(base))
    assert "pip install bitsandbytes" in str(refusal.value)


def test_a_model_that_is_there_already_is_quantised_to_the_same_bytes(base: Path) -> None:
    filled = built(plan_for(base, model={"dtype": "bfloat16"})).model.get_base_model()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False)
    quantise_now(model, "nf4", torch.bfloat16)
    one, other = (m.get_submodule("model.layers.1.mlp.fc1") for m in (model, filled))
    assert torch.equal(bits(one.weight), bits(other.base_layer.weight))
