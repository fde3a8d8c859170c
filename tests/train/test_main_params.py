"""Without float32 masters: every layout computes one process's losses, comes back to the bit, and keeps two bytes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.errors import Refusal
from hpcft.run import manifest as manifests
from hpcft.run.manifest import PARTS, verify
from hpcft.run.paths import RunPaths
from hpcft.train import world
from hpcft.train.adamw import MOMENTS
from hpcft.train.facts import check_facts
from hpcft.train.model import prepare_model
from hpcft.train.reader import Reader
from hpcft.train.strategies import ddp
from tests.train import families, small
from tests.train.equivalence import Curve, difference, trained

STEPS = 6
ROUNDING = 5e-3  # of losses and norms of some steps: layouts round in another order; measured are up to 3e-3
PREPARED = small.Prepared(small.windows(22))
LEAN = {"dtype": "bfloat16", "main_params_dtype": "bfloat16"}
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "one process": ("ddp", {"dp": 1}),
    "DDP": ("ddp", {"dp": 2}),
    "TP": ("ddp", {"dp": 1, "tp": 2}),
    "FSDP2": ("fsdp", {"dp": 2}),
    "HSDP": ("fsdp", {"dp_replicate": 2, "dp": 2}),
    "FSDP2×TP": ("fsdp", {"dp": 2, "tp": 2}),
    "FSDP2, offloaded": ("fsdp_offload", {"dp": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("model") / "llama", "llama")


def plan_of(folder: Path, layout: str, **changes: Any) -> Any:
    changes = {"model": LEAN, "optim": {"max_steps": STEPS}, **changes}
    return families.plan_with(folder, *LAYOUTS[layout], **changes)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """One process's losses and norms."""
    return trained(plan_of(folder, "one process"), tmp_path_factory.mktemp("alone"), PREPARED)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_every_layout_gives_the_losses_of_one_process_but_for_rounding(
    layout: str, folder: Path, alone: Curve, tmp_path: Path
) -> None:
    assert difference(trained(plan_of(folder, layout), tmp_path, PREPARED), alone) < ROUNDING


def test_it_learns_as_with_masters_where_updates_are_not_too_small(folder: Path, alone: Curve, tmp_path: Path) -> None:
    masters = trained(plan_of(folder, "one process", model={"dtype": "bfloat16"}), tmp_path, PREPARED)
    assert alone[-1][0] < alone[0][0] - 0.5
    assert 0 < difference(alone, masters) < ROUNDING


def stopped(at: int) -> Any:
    """A watch that asks for a stop in step ``at``."""

    def watch(step: int, signals: Any, run: Any) -> None:
        if step == at and run.world.first:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


def state(root: Path, step: int) -> dict[str, list[float]]:
    """Every number of a checkpoint."""
    found = verify(RunPaths(root).checkpoint(step))
    with Reader(found.folder, found) as reader:
        sizes = {name: torch.Size(shape).numel() for name, shape in reader.names().items()}
        return {f"{p} {n}": reader.read(n, p, 0, size).tolist() for n, size in sizes.items() for p in PARTS}


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_a_preempted_and_resumed_run_is_bitwise_the_undisturbed_one(layout: str, folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, layout)
    small.on_ranks(2, small.train_here, plan, tmp_path / "whole", PREPARED)
    small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, stopped(3))
    assert len(small.losses(tmp_path / "cut")) == 3
    small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, attempt=2)
    assert small.losses(tmp_path / "cut") == small.losses(tmp_path / "whole")
    assert state(tmp_path / "cut", STEPS) == state(tmp_path / "whole", STEPS)


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under DDP with a checkpoint after its third step; to be copied."""
    root = tmp_path_factory.mktemp("saved")
    trained(plan_of(folder, "DDP", checkpoint={"save_steps": 3}), root, PREPARED)
    return root


@pytest.mark.parametrize("layout", ["FSDP2", "TP"])
def test_what_ddp_saved_another_strategy_goes_on_with(
    layout: str, folder: Path, saved: Path, alone: Curve, tmp_path: Path
) -> None:
    shutil.copytree(RunPaths(saved).checkpoint(3), RunPaths(tmp_path).checkpoint(3))
    after = trained(plan_of(folder, layout, checkpoint={"save_steps": 0}), tmp_path, PREPARED, attempt=2)
    assert difference(after, alone[3:]) < ROUNDING


def test_a_checkpoint_has_its_one_form_and_loses_nothing(saved: Path) -> None:
    for file in RunPaths(saved).checkpoint(3).glob("*.safetensors"):
        header = file.read_bytes()
        size = int.from_bytes(header[:8], "little")
        kinds = {entry["dtype"] for key, entry in json.loads(header[8 : 8 + size]).items() if key != "__metadata__"}
        assert kinds == {"F32"}
    for key, numbers in state(saved, 3).items():
        kept = torch.tensor(numbers)
        assert torch.equal(kept, kept.bfloat16().float()), key
        assert kept.abs().sum() > 0, key


def test_a_run_does_not_go_on_from_a_checkpoint_of_the_other_kind(folder: Path, saved: Path) -> None:
    manifest = manifests.read(RunPaths(saved).checkpoint(3))
    check_facts(manifest, plan_of(folder, "FSDP2"), PREPARED.content)
    with pytest.raises(Refusal, match=r"model.main_params_dtype: 'bfloat16' then, 'float32' now"):
        check_facts(manifest, plan_of(folder, "DDP", model={"dtype": "bfloat16"}), PREPARED.content)
    del manifest.facts["model"]["main_params_dtype"]  # of a release that had masters only
    with pytest.raises(Refusal, match=r"model.main_params_dtype: 'float32' then, 'bfloat16' now"):
        check_facts(manifest, plan_of(folder, "DDP"), PREPARED.content)


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_weights_gradients_and_moments_are_bfloat16_and_no_other_copy_is_as_large(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    plan = plan_of(folder, layout, optim={"max_steps": 2})
    before = wide_numbers()

    def looked_at(step: int, signals: Any, run: Any) -> None:
        optimizer = run.sharded.optimizer
        kept = [p for group in optimizer.param_groups for p in group["params"]]
        assert {p.dtype for p in (*kept, *run.sharded.model.parameters())} == {torch.bfloat16}
        assert {p.grad.dtype for p in kept} == {torch.bfloat16}
        if step == 2:
            moments = [state[part] for state in optimizer.state.values() for part in MOMENTS]
            assert len(moments) == 2 * len(kept)
            assert {moment.dtype for moment in moments} == {torch.bfloat16}
            assert wide_numbers() - before < 0.1 * sum(p.numel() for p in kept) / 2

    small.on_ranks(2, small.train_here, plan, tmp_path, PREPARED, looked_at)


def wide_numbers() -> int:
    """float32 numbers that are alive in this process, each once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.dtype is torch.float32 and t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) // 4


def built(folder: Path) -> ddp.DataParallel:
    plan = plan_of(folder, "one process")
    here = world.World(plan.layout.place(0), plan.layout, torch.device("cpu"), 0, 1)
    return ddp.build(prepare_model(plan, here), plan, here)


def test_under_ddp_the_parameter_is_its_master(folder: Path) -> None:
    sharded = built(folder)
    assert all(slot.parameter.data_ptr() == slot.master.data_ptr() for slot in sharded.slots.values())


def test_the_norm_of_gradients_is_not_rounded_to_their_type(folder: Path) -> None:
    sharded = built(folder)
    torch.manual_seed(0)
    sharded.reduce()
    gradients = [slot.grad.normal_() for slot in sharded.slots.values()]
    exact = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    assert float(sharded.norm()) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(("rate", "moved"), [(1e-3, False), (1e-2, True)])
def test_an_update_that_is_smaller_than_a_step_between_two_numbers_is_lost(
    rate: float, moved: bool, folder: Path
) -> None:
    sharded = built(folder)
    slot = sharded.slots["model.norm.weight"]
    slot.master.fill_(1.0)  # bfloat16 next to one is 1.0078 and 0.9961
    sharded.backward(sharded.model(input_ids=torch.arange(8)[None]).logits.float().square().mean(), last=True)
    sharded.reduce()
    assert float(slot.grad.abs().min()) > 0
    small.step(sharded, rate)
    assert bool((slot.parameter != 1.0).all()) is moved
    assert bool((slot.parameter == 1.0).all()) is not moved
