"""Two ranks are one process: the same losses, norms and weights, whatever the masks and the number of windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import loop, totals
from hpcft.train import model as models
from hpcft.train.metrics import read_metrics
from hpcft.train.norm import global_norm
from hpcft.train.precision import LossScale
from hpcft.train.strategies import ddp
from hpcft.train.world import World, join
from tests import plans
from tests.train import small

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


def curve(root: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(RunPaths(root).metrics) if "loss" in line]


@pytest.mark.parametrize("tuner", [{}, LORA, {**LORA, "use_dora": True, "modules_to_save": ("lm_head",)}])
def test_two_ranks_give_the_losses_norms_and_weights_of_one(
    tuner: dict[str, Any], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddp, "BUCKET_BYTES", 20_000)
    prepared = small.Prepared(small.windows(20))
    options: dict[str, Any] = {"tuner": tuner, "optim": {"max_steps": 3, "weight_decay": 0.1}}
    one_batch = {"global_windows": 8, "micro_windows": 4, "accumulation": 2}
    two_batch = {"global_windows": 8, "micro_windows": 2, "accumulation": 2}
    [one] = small.on_ranks(
        1, small.train_here, small.tiny(model, 1, batch=one_batch, **options), tmp_path / "1", prepared
    )
    two = small.on_ranks(
        2, small.train_here, small.tiny(model, 2, batch=two_batch, **options), tmp_path / "2", prepared
    )
    assert len(curve(tmp_path / "1")) == 3
    for step_of_one, step_of_two in zip(curve(tmp_path / "1"), curve(tmp_path / "2"), strict=True):
        assert step_of_two == pytest.approx(step_of_one, rel=1e-5)
    assert two[0]["weights"] == two[1]["weights"]
    for name, weights in one["weights"].items():
        assert two[0]["weights"][name] == pytest.approx(weights, abs=2e-5), name


def test_a_rank_without_a_window_in_the_last_step_adds_nothing_and_hangs_nobody(tmp_path: Path, model: Path) -> None:
    prepared = small.Prepared(small.windows(5))  # steps of 4 and of 1: the second rank has none in every other step
    options: dict[str, Any] = {"optim": {"max_steps": 4}}
    small.on_ranks(1, small.train_here, small.tiny(model, 1, **options), tmp_path / "1", prepared)
    small.on_ranks(
        2,
        small.train_here,
        small.tiny(model, 2, batch={"micro_windows": 1, "accumulation": 2}, **options),
        tmp_path / "2",
        prepared,
    )
    for one, two in zip(curve(tmp_path / "1"), curve(tmp_path / "2"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def alone(plan: Any) -> World:
    return World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)


def built(folder: Path, **changes: Any) -> ddp.DataParallel:
    plan = small.tiny(folder, 1, **changes)
    return ddp.build(models.prepare_model(plan, alone(plan)), plan, alone(plan))


def test_masters_are_float32_and_working_copies_of_the_compute_type(model: Path) -> None:
    sharded = built(model, model={"dtype": "bfloat16"}, tuner=LORA)
    trained = {n: p for n, p in sharded.model.named_parameters() if p.requires_grad}
    assert sharded.slots.keys() == trained.keys()
    assert all(p.dtype is torch.bfloat16 for p in sharded.model.parameters())
    for name, slot in sharded.slots.items():
        assert slot.master.dtype is torch.float32
        assert torch.equal(slot.master.to(torch.bfloat16), trained[name])


def test_masters_keep_updates_that_the_compute_type_would_round_away(model: Path) -> None:
    sharded = built(model, model={"dtype": "bfloat16"})
    before = {name: (slot.master.clone(), slot.parameter.detach().clone()) for name, slot in sharded.slots.items()}
    sharded.backward(sharded.model(input_ids=torch.arange(8)[None]).logits.float().square().mean(), last=True)
    sharded.reduce()
    small.step(sharded, 1e-6)
    norm = sharded.slots["model.norm.weight"]  # ones: bfloat16 next to one is 1.0078
    assert torch.equal(norm.parameter, before["model.norm.weight"][1])
    assert not torch.equal(norm.master, before["model.norm.weight"][0])


def test_in_float32_the_parameter_is_its_master(model: Path) -> None:
    sharded = built(model)
    assert all(s.parameter.data_ptr() == s.master.data_ptr() for s in sharded.slots.values())


def test_only_matrices_decay(model: Path) -> None:
    sharded = built(model, optim={"weight_decay": 0.1})
    decay = {id(p): g["weight_decay"] for g in sharded.optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(sharded.slots)
    for name, slot in sharded.slots.items():
        assert decay[id(slot.master)] == (0.1 if slot.master.dim() == 2 else 0.0), name


@pytest.mark.parametrize(
    ("nodes", "gigabytes", "megabytes", "overlaps"),
    [
        (1, 300.0, 160, False),  # adapters: a message beside matrix products costs more than one after them
        (1, 300.0, 640, True),
        (1, 25.0, 160, True),
        (2, 300.0, 160, True),
        (1, None, 1, True),  # links of which nothing is known
    ],
)
def test_short_sums_inside_a_node_wait_for_the_end_of_the_backward_pass(
    nodes: int, gigabytes: float | None, megabytes: int, overlaps: bool
) -> None:
    plan: Any = SimpleNamespace(memory=None, layout=plans.layout(nodes, 4))
    if gigabytes is not None:
        plan.memory = SimpleNamespace(hardware=SimpleNamespace(node_bandwidth=gigabytes))
    buckets = [ddp.Bucket(torch.empty(megabytes * 2**18, device="meta"))]
    assert ddp._overlaps(plan, buckets) is overlaps


def test_sums_begun_at_the_end_are_those_begun_on_the_way(model: Path, tmp_path: Path, small_buckets: None) -> None:
    plan, prepared = small.tiny(model, 2, optim={"max_steps": 3}), small.Prepared(small.windows(24))
    found = []
    for name, overlaps in (("way", True), ("end", False)):
        small.on_ranks(2, train_with, overlaps, plan, tmp_path / name, prepared)
        found.append(curve(tmp_path / name))
    assert len(found[0]) == 3
    assert found[0] == found[1]


def train_with(overlaps: bool, plan: Plan, root: Path, prepared: Any) -> None:
    ddp._overlaps = lambda *_: overlaps
    small.train_here(plan, root, prepared)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_number_of_the_state_is_on_exactly_one_rank(size: int, model: Path) -> None:
    sharded = built(model)
    covered: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rank in range(size):
        layout = plans.layout(1, size)
        sharded.world = World(layout.place(rank), layout, torch.device("cpu"), rank, size)
        for shard in sharded.shards():
            covered.setdefault((shard.name, shard.part), []).append((shard.offset, shard.tensor.numel()))
    assert len(covered) == 3 * len(sharded.slots)
    for (name, _), pieces in covered.items():
        at = 0
        for offset, length in sorted(pieces):
            assert offset == at
            at += length
        assert at == sharded.slots[name].master.numel()


def test_the_loss_scale_is_gone_from_the_gradients_and_from_the_norm(model: Path) -> None:
    plain, scaled = built(model), built(model)
    scaled.scale = LossScale(2.0**12, dynamic=True)
    tokens = torch.arange(8)[None]
    for sharded in (plain, scaled):
        sharded.backward(sharded.model(input_ids=tokens).logits.square().mean(), last=True)
        sharded.reduce()
    assert float(scaled.norm()) == pytest.approx(float(plain.norm()), rel=1e-6)


@pytest.mark.parametrize(("norm", "max_norm", "divisor"), [(4.0, 2.0, 2.0), (1.5, 2.0, 1.0), (4.0, 0.0, 1.0)])
def test_gradients_above_the_greatest_norm_are_divided_down_to_it(norm: float, max_norm: float, divisor: float) -> None:
    assert float(loop.clipping(torch.tensor(norm), max_norm)) == pytest.approx(divisor, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_divided_gradients_is_that_with_smaller_ones(dtype: str, model: Path) -> None:
    whole, halved = (built(model, model={"dtype": dtype}) for _ in range(2))
    for sharded, times in ((whole, 1.0), (halved, 0.5)):
        sharded.backward(sharded.model(input_ids=torch.arange(8)[None]).logits.float().square().mean(), last=True)
        sharded.reduce()
        for slot in sharded.slots.values():
            slot.grad.mul_(times)
    small.step(halved, 1e-2)
    whole.step(1e-2, torch.tensor(2.0), torch.ones(()))
    whole.end_step(True)
    for name, slot in whole.slots.items():
        assert torch.equal(slot.master, halved.slots[name].master), name
        assert torch.equal(slot.parameter, halved.slots[name].parameter), name


def test_the_update_is_queued_before_the_host_waits_for_the_numbers_of_the_step(model: Path, tmp_path: Path) -> None:
    plan = small.tiny(model, 1, optim={"max_steps": 1})
    assert small.on_ranks(1, order_of_a_step, plan, tmp_path) == [["asked", "queued", "waited"]]


def order_of_a_step(plan: Plan, root: Path) -> list[str]:
    order, on_host, step = list[str](), totals.on_host, ddp.DataParallel.step

    def asked(numbers: torch.Tensor) -> Callable[[], list[float]]:
        order.append("asked")
        answer = on_host(numbers)

        def waited() -> list[float]:
            order.append("waited")
            return answer()

        return waited

    def queued(*arguments: Any) -> None:
        order.append("queued")
        step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(totals, "on_host", asked)
        patch.setattr(ddp.DataParallel, "step", queued)
        small.train_here(plan, root, small.Prepared(small.windows(4)))
    return order


def test_only_the_first_norm_sends_numbers_to_the_device_for_which_the_host_would_wait(model: Path) -> None:
    assert small.on_ranks(2, sent_for_norms, small.tiny(model, 2)) == [[1, 1, 1]] * 2


def sent_for_norms(plan: Plan) -> list[int]:
    here, squares, tensor, sent, counts = join(plan), torch.ones(()), torch.tensor, list[Any](), list[int]()

    def counted(what: Any, **how: Any) -> torch.Tensor:
        sent.append(what)
        return tensor(what, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", counted)
        for _ in range(3):
            assert float(global_norm(here, squares, squares, once="dp_replicate")) == 2.0
            counts.append(len(sent))
    return counts


def test_a_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(8.0, dynamic=True, growth_interval=2)
    scale.shrink()
    assert scale.value == 4.0
    scale.grow()
    scale.grow()
    assert (scale.value, scale.good_steps) == (8.0, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_learn(dtype: str, tmp_path: Path, model: Path) -> None:
    plan = small.tiny(model, 1, model={"dtype": dtype}, optim={"max_steps": 12, "learning_rate": 3e-3})
    small.on_ranks(1, small.train_here, plan, tmp_path, small.Prepared(small.windows(4)))
    losses = [loss for _, loss in small.losses(tmp_path)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_gradient_takes_the_place_of_the_last_step_s_and_later_ones_are_added(
    dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddp, "WIDENED", 8)  # in several pieces, the last one shorter
    first, second = torch.linspace(-3, 3, 2 * 21).view(2, 3, 7).to(dtype)
    slot = ddp.Slot(
        "w", nn.Parameter(torch.zeros(3, 7)), torch.zeros(3, 7), torch.full((3, 7), torch.nan), (3, 7), None
    )
    slot.add(first, scale)
    assert not slot.fresh
    torch.testing.assert_close(slot.grad, first.float() / scale, rtol=0, atol=0)
    slot.add(second, scale)
    torch.testing.assert_close(slot.grad, first.float() / scale + second.float() / scale)
    slot.add(second.t().contiguous().t(), scale)
    torch.testing.assert_close(slot.grad, first.float() / scale + 2 * second.float() / scale)


@pytest.mark.parametrize(("dtype", "apart"), [("float32", True), ("bfloat16", False)])
def test_gradients_of_one_rank_alone_stay_where_they_were_made_if_they_have_their_masters_type(
    dtype: str, apart: bool, model: Path
) -> None:
    sharded = built(model, model={"dtype": dtype})
    for _ in range(2):  # micro batches
        sharded.backward(sharded.model(input_ids=torch.arange(8)[None]).logits.float().square().mean(), last=True)
    sharded.reduce()
    assert all((bucket.grad is None) is apart for bucket in sharded.buckets)
    assert all(slot.master.grad is slot.grad for slot in sharded.slots.values())
    small.step(sharded, 1e-3)
    assert all((slot.grad is None) is apart for slot in sharded.slots.values())


def test_a_weight_that_no_loss_reaches_any_more_has_no_gradient_of_an_earlier_step(tmp_path: Path, model: Path) -> None:
    plan = small.tiny(model)
    [norms] = small.on_ranks(1, norms_of_an_unreached_weight, plan, tmp_path)
    assert norms[0] > 0
    assert norms[1] == 0.0


def norms_of_an_unreached_weight(plan: Any, root: Path) -> list[float]:
    """The gradient's norm after a step that reaches every weight, and after one that reaches none."""
    import os

    from hpcft.train import assemble, world
    from hpcft.train.signals import Signals

    here = world.join(plan, os.environ)
    prepared = small.Prepared(small.windows(8))
    run = assemble.assemble(plan, RunPaths(root), here, Signals(), os.environ, prepared=prepared)
    found = []
    for reached in (True, False):
        sharded = run.sharded
        parameters = [p.float().sum() for p in sharded.model.parameters()]
        loss = torch.stack(parameters).sum() if reached else torch.zeros((), requires_grad=True)
        sharded.backward(loss, last=True)
        sharded.reduce()
        found.append(float(sharded.norm()))
        sharded.end_step(False)
    return found
