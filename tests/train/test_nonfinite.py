"""A loss or gradient that is no number, or not the same on all ranks, is seen by all of them in the same step."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.plan.plan import Plan
from hpcft.run.manifest import PARTS
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, world
from hpcft.train.metrics import read_metrics
from hpcft.train.objectives import sft
from hpcft.train.protocols import Batch, Loss
from hpcft.train.signals import Signals
from hpcft.train.strategies.ddp import DataParallel
from tests.train import small

PREPARED = small.Prepared(small.windows(8))
BAD = 5  # the window whose loss is spoilt


@pytest.fixture(params=["loss", "gradient", "loss alone"])
def spoilt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    loss = sft.Supervised.loss

    def bad(self: Any, model: torch.nn.Module, batch: Batch, known: Any) -> Loss:
        value = loss(self, model, batch).value
        if BAD in batch.windows:
            value = spoil[request.param](value)
        return Loss(value)

    spoil = {
        "loss": lambda value: value * math.nan,
        "gradient": lambda value: value + (value - value.detach()).sqrt(),
        "loss alone": lambda value: value + math.inf,  # on one rank of two, and every gradient is a number
    }

    monkeypatch.setattr(sft.Supervised, "loss", bad)
    return str(request.param)


def options(policy: str) -> dict[str, Any]:
    return {"optim": {"max_steps": 2}, "train": {"nonfinite": policy}, "checkpoint": {"save_steps": 1, "keep": 9}}


def test_stop_ends_all_ranks_naming_step_and_windows_and_saves_nothing_of_it(
    spoilt: str, tmp_path: Path, model: Path
) -> None:
    with pytest.raises(AssertionError) as caught:
        small.on_ranks(2, small.train_here, small.tiny(model, 2, **options("stop")), tmp_path, PREPARED)
    text = str(caught.value)
    assert text.count("NotFinite: step") == 2, "not every rank saw it"
    assert str(BAD) in text.partition("windows ")[2].splitlines()[0]
    bad_step = int(text.partition("NotFinite: step ")[2].split(":")[0])
    steps = [int(p.name[5:]) for p in RunPaths(tmp_path).checkpoints.glob("step-*")]
    assert all(step < bad_step for step in steps)


def test_skip_discards_the_step_everywhere_counts_it_and_shows_it(spoilt: str, tmp_path: Path, model: Path) -> None:
    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **options("skip")), tmp_path, PREPARED)
    assert [r["progress"]["skipped"] for r in results] == [1, 1]
    assert results[0]["weights"] == results[1]["weights"]
    assert all(math.isfinite(w) for weights in results[0]["weights"].values() for w in weights)
    [line] = [line for line in read_metrics(RunPaths(tmp_path).metrics) if line.get("finite") is False]
    assert line["skipped"] == 1
    assert (line["grad_norm"] is None) == (spoilt != "loss alone")
    assert (line["loss"] is None) == (spoilt != "gradient")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_a_skipped_step_leaves_masters_moments_and_their_count_to_the_bit(
    strategy: str, tmp_path: Path, model: Path
) -> None:
    plan = small.tiny(model, 2, train={"nonfinite": "skip", "strategy": strategy})
    for first, skipped, third in small.on_ranks(2, states, plan, tmp_path, PREPARED):
        assert skipped == first
        assert (first["updates"], third["updates"]) == (1, 2)
        assert all(third[part] != first[part] for part in PARTS)


def states(plan: Plan, root: Path, prepared: Any) -> list[dict[str, int]]:
    """After each of three steps, the second of them bad: checksums of this rank's parts, and AdamW's count."""
    here, loss, found = world.join(plan, os.environ), sft.Supervised.loss, []
    run = assemble.assemble(plan, RunPaths(root), here, Signals(), os.environ, prepared=prepared)

    def bad(self: Any, model: torch.nn.Module, batch: Batch, known: Any) -> Loss:
        return Loss(loss(self, model, batch, known).value * math.nan)

    for spoil in (loss, bad, loss):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft.Supervised, "loss", spoil)
            loop.optimizer_step(run, next(run.steps))
        sums = dict.fromkeys(PARTS, 0)
        for shard in run.sharded.shards():
            sums[shard.part] = zlib.crc32(shard.tensor.contiguous().numpy().tobytes(), sums[shard.part])
        found.append({**sums, "updates": run.sharded.updates})
    return found


@pytest.mark.parametrize(("max_norm", "stops"), [(1e-3, True), (0.0, False), (1e3, False)])
def test_ranks_that_would_clip_the_same_gradients_differently_stop(
    max_norm: float, stops: bool, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = DataParallel.norm

    def off_by_a_bit(sharded: DataParallel) -> torch.Tensor:
        right = norm(sharded)
        return torch.nextafter(right, 2 * right) if sharded.world.rank == 1 else right

    monkeypatch.setattr(DataParallel, "norm", off_by_a_bit)
    plan = small.tiny(model, 2, optim={"max_steps": 1, "max_grad_norm": max_norm})
    if not stops:
        assert all(r["finished"] for r in small.on_ranks(2, small.train_here, plan, tmp_path, PREPARED))
        return
    with pytest.raises(AssertionError) as caught:
        small.on_ranks(2, small.train_here, plan, tmp_path, PREPARED)
    assert str(caught.value).count("Refusal: step 1: the ranks reckon") == 2, "not every rank saw it"
