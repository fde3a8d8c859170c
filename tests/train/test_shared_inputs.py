"""Adapters that read the same input read it once, and say and learn what they did apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcft.train import model as models
from hpcft.train import shared_inputs
from hpcft.train.shared_inputs import Member
from hpcft.train.strategies import ddp
from hpcft.train.world import World
from tests.train import small

LORA = {"kind": "lora", "rank": 3, "alpha": 6.0}
TOKENS = torch.arange(48).reshape(2, 24)


def built(folder: Path, **changes: Any) -> ddp.DataParallel:
    plan = small.tiny(folder, 1, **{"tuner": LORA, **changes})
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    sharded = ddp.build(models.prepare_model(plan, here), plan, here)
    torch.manual_seed(1)
    for name, slot in sharded.slots.items():
        if "lora_B" in name:  # zeros at first, by which the others would have no gradient
            torch.nn.init.normal_(slot.master, std=0.1)
    return sharded


@pytest.fixture
def apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> ddp.DataParallel:
    """The same model with every adapter by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(models, "share_inputs", lambda model: None)
        return built(model)


def members(sharded: ddp.DataParallel) -> list[str]:
    return [name for name, module in sharded.model.named_modules() if isinstance(module, Member)]


def learn(sharded: ddp.DataParallel) -> None:
    sharded.backward(sharded.model(input_ids=TOKENS).logits.square().mean(), last=True)


def test_those_of_attention_and_of_the_mlp_are_joined_and_the_names_stay(model: Path, apart: Any) -> None:
    sharded = built(model)
    kinds = {name.split(".")[-3] for name in members(sharded)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert sharded.slots.keys() == apart.slots.keys()


def test_joined_adapters_say_and_learn_what_they_did_apart(model: Path, apart: Any) -> None:
    sharded = built(model)
    for made in (sharded, apart):
        learn(made)
    assert torch.allclose(sharded.model(input_ids=TOKENS).logits, apart.model(input_ids=TOKENS).logits, atol=1e-6)
    for name, slot in sharded.slots.items():
        assert float(slot.grad.abs().max()) > 0, name
        torch.testing.assert_close(slot.grad, apart.slots[name].grad, rtol=1e-4, atol=1e-7)


def test_what_they_share_is_not_kept(model: Path) -> None:
    sharded = built(model)
    learn(sharded)
    joined = {m.joined for m in sharded.model.modules() if isinstance(m, Member)}
    assert len(joined) == 4
    assert all(j.input is None and not j.products for j in joined)


class Products(TorchDispatchMode):
    """Counts products with a rank's width."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.found = widths, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.found += result.shape[-1] in self.widths
        return result


def test_an_input_is_read_once_for_all_of_them(model: Path, apart: Any) -> None:
    counts = []
    for sharded in (built(model), apart):
        with Products({3, 6, 9}) as products, torch.no_grad():
            sharded.model(input_ids=TOKENS)
        counts.append(products.found)
    assert counts == [2 * 4, 2 * 7], "of a layer: attention, its output, the MLP and its output; or seven"


@pytest.mark.parametrize("tuner", [{"dropout": 0.1}, {"use_dora": True}])
def test_those_that_see_an_input_of_their_own_stay_apart(tuner: dict[str, Any], model: Path) -> None:
    assert members(built(model, tuner={**LORA, **tuner})) == []


def test_only_some_of_them_are_joined_where_only_some_are_adapted(model: Path) -> None:
    sharded = built(model, tuner={**LORA, "target_modules": ("q_proj", "v_proj", "up_proj")})
    assert {name.split(".")[-3] for name in members(sharded)} == {"q_proj", "v_proj"}


def test_a_member_that_meets_another_input_makes_its_own_product() -> None:
    one, two = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(4, 3, bias=False)
    joined, x, y = shared_inputs.Joined([one, two]), torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(joined.product(0, x), one(x))
    torch.testing.assert_close(joined.product(1, y), two(y))
    torch.testing.assert_close(joined.product(0, y), one(y))
    torch.testing.assert_close(joined.product(0, x), one(x))
    torch.testing.assert_close(joined.product(0, x), one(x))


@pytest.mark.parametrize(
    ("strategy", "recomputation", "joined"),
    [
        ("ddp", "none", True),
        ("zero2", "none", True),
        ("fsdp", "none", True),
        ("zero3", "none", False),  # weights come module by module
        ("ddp", "full", False),  # a compiled layer that is recomputed remembers nothing
    ],
)
def test_they_stay_apart_where_one_may_not_meet_the_weights_of_another(
    strategy: str, recomputation: str, joined: bool, model: Path
) -> None:
    plan = small.tiny(model, 1, tuner=LORA, train={"strategy": strategy, "recomputation": recomputation})
    here = World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    assert any(isinstance(m, Member) for m in models.prepare_model(plan, here).model.modules()) is joined
