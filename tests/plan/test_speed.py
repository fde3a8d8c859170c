"""The model of time: arithmetic by hand, traffic by hand, and what must hold for any run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hpcft.plan.hardware import GPU_GIB, PEAK_TFLOPS, hardware
from hpcft.plan.plan import Plan
from hpcft.plan.prediction import Hardware
from hpcft.plan.speed import (
    ATTENTION,
    COMPILED,
    EAGER,
    GATES,
    HBM,
    HIDDEN,
    LATENCY,
    LOSS_BYTES,
    NORMS,
    PRODUCTS,
    ZERO3_LAYER,
    bandwidth,
    step_flop,
    step_time,
)  # fmt: skip
from hpcft.plan.weights import all_weights
from tests.plan.models import shape
from tests.plan.tiny_shape import ALL, H100S, LAYER, on_gpus, tiny
from tests.words import PROFILES, profile

STEP = 4 * 64  # tokens of an optimizer step
SEEN = 2 * 8 * 64  # of one token in one layer: 8 numbers of queries over a window of 64
HEAD = 32 * 8
LINKS = Hardware(gpu_bytes=None, host_bytes=None, node_bandwidth=100.0, fabric_bandwidth=10.0, host_bandwidth=50.0)


def seconds(made: Plan, part: str = "total", links: Hardware = LINKS, name: str = "Qwen2.5-7B") -> float:
    time = step_time(made, shape(name), links)
    assert time is not None
    return float(getattr(time, part))


def arithmetic(made: Plan, gpus: int = 1, times: float = EAGER) -> float:
    """Seconds of products, attention, and of what lies between them, when nothing is recomputed."""
    products, attention = step_flop(made, tiny())
    between = 4 * 2 * (NORMS * 8 + GATES * 16) * times + LOSS_BYTES * 32
    tokens = made.batch.global_windows * 64
    return (products / PRODUCTS / 989e12 + attention / ATTENTION / 989e12 + tokens * between / HBM) / gpus


def test_compiled_layers_move_less_between_products() -> None:
    made = on_gpus()
    compiled = dataclasses.replace(made, train=dataclasses.replace(made.train, compiled=True))
    time = step_time(compiled, tiny(), H100S)
    assert time is not None
    assert time.compute == pytest.approx(arithmetic(compiled, times=COMPILED) + 34 * ALL / HBM)


def test_full_training_takes_six_operations_a_weight_and_adapters_four() -> None:
    attention = STEP * 3 * 4 * SEEN
    assert step_flop(on_gpus(), tiny()) == (STEP * (6 * 4 * LAYER + 6 * HEAD), attention)
    assert step_flop(on_gpus(kind="lora"), tiny()) == (STEP * (4 * 4 * LAYER + 4 * HEAD), attention)


def test_recomputed_layers_run_forward_once_more() -> None:
    products, attention = step_flop(on_gpus(), tiny())
    for recomputation, layers in (("selective", 2), ("full", 4)):
        again = STEP * layers * 2 * LAYER, STEP * layers * SEEN
        found = step_flop(on_gpus(recomputation=recomputation), tiny())
        assert found == (products + again[0], attention + again[1])


@pytest.mark.parametrize(
    ("rows", "reference", "passes"),
    [("pair", "none", 0), ("pair", "adapters_off", 1), ("rated", "precompute", 1), ("rated", "adapters_off", 3)],
)
def test_a_preference_objective_s_forward_passes_are_counted(rows: str, reference: str, passes: int) -> None:
    made = on_gpus(kind="lora")
    objective = dataclasses.replace(made.objective, reference=reference)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, rows=rows), objective=objective)
    beside = passes * STEP * (4 * 2 * LAYER + 2 * HEAD)
    head_again = STEP * 2 * HEAD
    products, attention = step_flop(on_gpus(kind="lora"), tiny())
    assert step_flop(made, tiny()) == (products + head_again + beside, attention + passes * STEP * 4 * SEEN)


def test_a_step_takes_the_time_of_its_arithmetic_and_of_its_optimizer() -> None:
    made = on_gpus()
    time = step_time(made, tiny(), H100S)
    assert time is not None
    assert time.compute == pytest.approx(arithmetic(made) + 34 * ALL / HBM)
    assert (time.exposed, time.host) == (0.0, 0.0)
    assert time.total == time.compute


def test_without_masters_the_optimizer_moves_less_than_half_and_ddp_sums_two_bytes_a_weight() -> None:
    lean = on_gpus(main_params="bfloat16")
    time = step_time(lean, tiny(), H100S)
    assert time is not None
    assert time.compute == pytest.approx(arithmetic(lean) + 14 * ALL / HBM)
    summed = {}
    for strategy in ("ddp", "fsdp"):
        long = on_gpus(strategy, ranks=4, data={"max_length": 8192}, main_params="bfloat16")
        masters = on_gpus(strategy, ranks=4, data={"max_length": 8192})
        summed[strategy] = traffic(masters) - traffic(long)
    assert summed["ddp"] == pytest.approx(2 * 2 * shape("Qwen2.5-7B").parameters * 3 / 4 / 100e9)
    assert summed["fsdp"] == 0


def test_of_experts_only_the_active_ones_take_time() -> None:
    whole = dataclasses.replace(tiny(), experts=8, experts_per_token=2)
    dense = dataclasses.replace(tiny(), inner=2 * 16)
    router = 8 * 8
    assert whole.active == dense.layer + router


def traffic(made: Plan, name: str = "Qwen2.5-7B") -> float:
    """Seconds of traffic between data-parallel ranks, from what of it is not hidden when arithmetic is long enough."""
    return seconds(made, "exposed", name=name) / (1 - HIDDEN)


@pytest.mark.parametrize(
    ("strategy", "bytes_a_weight"),
    [
        ("ddp", 2 * 4),  # a sum of float32 gradients: scattered and gathered
        ("zero1", 4 + 2),  # scattered, and copies gathered
        ("zero2", 2 * 4 + 2),  # scattered in both forward passes
        ("zero3", 2 * (2 + 2 + 4)),
        ("fsdp", 2 * (2 + 2 + 2)),  # sent as they are, and added up where they arrive
    ],
)
def test_traffic_is_what_the_scheme_moves(strategy: str, bytes_a_weight: int) -> None:
    made = on_gpus(strategy, ranks=4, data={"max_length": 8192})
    layers = shape("Qwen2.5-7B").layers
    calls = {"ddp": layers, "zero1": layers, "zero2": 2 * layers}.get(strategy, 2 * 3 * layers)
    expected = bytes_a_weight * shape("Qwen2.5-7B").parameters * 3 / 4 / 100e9 + calls * LATENCY
    hooks = ZERO3_LAYER * layers * 2 * 2 if strategy == "zero3" else 0.0
    assert traffic(made) - hooks / (1 - HIDDEN) == pytest.approx(expected)


def test_adapters_cost_next_to_nothing_between_ranks() -> None:
    full, lora = (on_gpus(kind=kind, ranks=4, data={"max_length": 8192}) for kind in ("full", "lora"))
    trained = all_weights(lora, shape("Qwen2.5-7B")).trained
    assert traffic(lora) == pytest.approx(2 * 4 * trained * 3 / 4 / 100e9 + 28 * LATENCY)
    assert traffic(lora) < traffic(full) / 50


def test_traffic_that_arithmetic_is_too_short_for_is_waited_for() -> None:
    made = on_gpus(ranks=4)
    time = step_time(made, tiny(), LINKS)
    assert time is not None
    alone = 2 * 4 * ALL * 3 / 4 / 100e9 + 4 * LATENCY
    assert time.exposed == pytest.approx(alone - arithmetic(made, gpus=4))


def test_a_ring_through_several_nodes_goes_at_the_slower_link() -> None:
    assert bandwidth(on_gpus(ranks=4), LINKS) == 100
    assert bandwidth(on_gpus(nodes=2, ranks=4), LINKS) == 10
    assert bandwidth(on_gpus("fsdp", nodes=2, ranks=4, dp=4, tp=2), LINKS) == 5, "two rings share the adapters"
    assert bandwidth(on_gpus("fsdp", nodes=2, ranks=4, dp_replicate=2, dp=4), LINKS) == 100


def test_replicas_keep_the_gathering_inside_a_node() -> None:
    long: dict[str, Any] = {"data": {"max_length": 2**18}}
    whole = on_gpus("fsdp", nodes=2, ranks=4, **long)
    replicated = on_gpus("fsdp", nodes=2, ranks=4, dp_replicate=2, dp=4, **long)
    parameters, latency = shape("Qwen2.5-7B").parameters, 6 * 28 * LATENCY
    inside, across = 12 * parameters * 3 / 4 / 100e9, 2 * 4 * parameters / 4 / 2 / (10e9 / 4)
    assert traffic(replicated) == pytest.approx(inside + across + latency)
    assert traffic(whole) == pytest.approx(16 * parameters * 7 / 8 / 10e9 + latency)
    assert traffic(replicated) < traffic(whole) / 2


def test_tensor_parallel_traffic_hides_behind_nothing() -> None:
    made = on_gpus("fsdp", ranks=2, dp=1, tp=2)
    calls = 8 * 28 * 2
    expected = calls * (128 * 3584 * 2) / 2 / 100e9 + calls * LATENCY
    assert seconds(made, "exposed") == pytest.approx(expected)


def test_offloading_moves_gradients_down_and_weights_up_and_updates_on_cores() -> None:
    made = on_gpus("zero2_offload", ranks=4)
    parameters = shape("Qwen2.5-7B").parameters
    assert seconds(made, "host") == pytest.approx(6 * parameters / 4 / 50e9 + parameters / 4e9)
    assert seconds(on_gpus("fsdp_offload", ranks=4), "host") > seconds(made, "host"), "weights are streamed as well"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "fsdp_offload"])
def test_faster_links_never_take_longer(strategy: str) -> None:
    made = on_gpus(strategy, nodes=2, ranks=4)
    slow = [seconds(made, links=dataclasses.replace(LINKS, fabric_bandwidth=b)) for b in (1.0, 10.0, 100.0)]
    assert slow == sorted(slow, reverse=True)


@pytest.mark.parametrize("cluster", [name for name in PROFILES if profile(name).gpu_type])
def test_every_gpu_that_a_profile_names_has_its_peak(cluster: str) -> None:
    assert profile(cluster).gpu_type in PEAK_TFLOPS


def test_where_the_speed_is_not_known_there_is_no_time() -> None:
    made = on_gpus()
    unknown: dict[str, Any] = {"gpu_type": "x1"}
    assert (
        step_time(dataclasses.replace(made, resources=dataclasses.replace(made.resources, **unknown)), tiny(), LINKS)
        is None
    )
    cpu = dataclasses.replace(made.resources, accelerator="cpu")
    assert step_time(dataclasses.replace(made, resources=cpu), tiny(), LINKS) is None


def test_a_profile_s_words_win_over_the_tables() -> None:
    usual = hardware(gpu_type="H100", fabric="infiniband")
    assert usual.gpu_bytes == int(80 * 2**30 * 0.985)
    assert (usual.node_bandwidth, usual.fabric_bandwidth, usual.host_bytes) == (360, 370, None)
    said = hardware(
        gpu_type="a100", fabric="ethernet", gpu_memory=40, node_memory=512, node_bandwidth=200, fabric_bandwidth=24
    )
    assert (said.node_bandwidth, said.fabric_bandwidth, said.host_bytes) == (200, 24, 512 * 2**30)
    assert hardware(gpu_type="a100", fabric="ethernet").gpu_bytes is None, "40 or 80"
    assert hardware(gpu_type=None, fabric="ethernet").gpu_bytes is None
    assert set(GPU_GIB) <= set(PEAK_TFLOPS)
