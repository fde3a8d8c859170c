"""replan: another layout, the same mathematics."""

from __future__ import annotations

import dataclasses

import pytest

from hpcft.errors import Refusal
from hpcft.plan.replan import replan
from tests.words import plan, profile


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 8)])
def test_the_global_batch_data_and_schedule_stay(nodes: int, per_node: int) -> None:
    old = plan("--nodes 2 --global_batch_size 64 --per_device_train_batch_size 2")
    new = replan(old, nodes=nodes, nproc_per_node=per_node)
    assert new.layout.world_size == nodes * per_node
    assert (new.resources.nodes, new.resources.tasks_per_node, new.resources.gpus_per_node) == (
        nodes,
        per_node,
        per_node,
    )
    assert new.batch.global_windows == 64
    assert new.batch.micro_windows * new.batch.accumulation * nodes * per_node == 64
    kept = ("schema", "hpcft", "name", "model", "tuner", "data", "optim", "train", "checkpoint", "budgets", "folders")
    assert all(getattr(new, section) == getattr(old, section) for section in kept)


def test_a_forward_pass_never_holds_more_than_before() -> None:
    old = plan("--nproc_per_node 8 --global_batch_size 64 --per_device_train_batch_size 1 --max_length 512")
    assert replan(old, nproc_per_node=1).batch.micro_windows == 1


def test_a_layout_that_does_not_divide_the_batch_is_refused_with_batches_that_would() -> None:
    with pytest.raises(Refusal, match="16 windows do not divide among 24 ranks") as caught:
        replan(plan(), nodes=3, cluster=profile("infiniband-h100"))
    assert caught.value.problems[0].choices == ("24",)


def test_nothing_asked_changes_nothing_but_perhaps_the_forward_pass() -> None:
    old = plan("--nodes 2")
    assert replan(old) == old


def test_only_the_time_may_change() -> None:
    old = plan()
    new = replan(old, time_minutes=30)
    assert new == dataclasses.replace(old, resources=dataclasses.replace(old.resources, time_minutes=30))


def test_leaving_one_node_brings_the_settings_of_the_fabric() -> None:
    cluster = profile("infiniband-h100")
    new = replan(plan(), nodes=2, cluster=cluster)
    assert new.environment == plan("--nodes 2").environment
    with pytest.raises(Refusal, match="no settings of the fabric"):
        replan(plan(), nodes=2)


def test_a_replanned_run_is_the_run_planned_that_way_at_once() -> None:
    line = "--global_batch_size 64 --per_device_train_batch_size 2"
    replanned = replan(plan(line), nodes=2, nproc_per_node=4, cluster=profile("infiniband-h100"))
    assert replanned == plan(f"{line} --nodes 2 --nproc_per_node 4")


def test_an_attempt_may_be_spread_otherwise_than_the_one_before() -> None:
    line = "--nodes 2 --global_batch_size 64 --per_device_train_batch_size 2 --torch_compile false"
    changed = replan(plan(line), strategy="fsdp", tp=2, dp_replicate=2)
    assert changed == plan(f"{line} --strategy fsdp --tp 2 --dp_replicate 2")
    assert (changed.batch.global_windows, changed.layout.data_parallel, changed.batch.accumulation) == (64, 8, 4)
    assert replan(changed, strategy="ddp", tp=1, dp_replicate=1) == plan(line)


def test_what_a_deepspeed_file_added_goes_with_deepspeed() -> None:
    old = plan("""--deepspeed '{"zero_optimization": {"stage": 3, "overlap_comm": true}}'""")
    assert replan(old, strategy="zero2").train.deepspeed == old.train.deepspeed != ""
    assert replan(old, strategy="fsdp").train.deepspeed == ""


@pytest.mark.parametrize(
    ("line", "strategy", "said"),
    [
        ("--strategy fsdp --tp 2", "zero3", "parallel.tp: zero3 knows no such axis"),
        ("--strategy fsdp --dp_replicate 2", "ddp", "parallel.dp_replicate: ddp knows no such axis"),
        ("--quant_bits 4", "zero2", "a quantised base is not sharded by zero2"),
        ("--fp16 true", "zero2", "float16 needs its losses scaled"),
        ("", "zerro2", "no such value"),
    ],
)
def test_a_strategy_that_cannot_do_what_the_run_asks_is_refused(line: str, strategy: str, said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        replan(plan(line), strategy=strategy)
    assert caught.value.problems[0].hint
