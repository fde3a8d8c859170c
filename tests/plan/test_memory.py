"""The memory model, each formula by hand on a shape of 2,888 weights, and what must hold for any."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from hpcft.plan.activations import BACKWARD, ENDS, LOSS, MOMENTS
from hpcft.plan.memory import CONTEXT, FRAGMENTATION, NCCL, PROCESS, host_parts, measured, memory_plan
from hpcft.plan.plan import Plan
from hpcft.plan.speed import step_flop
from tests.plan.models import PUBLISHED, shape
from tests.plan.tiny_shape import ALL, H100S, HEAD, LAYER, ROOT, TOKENS, on_gpu, on_gpus, on_host, parts_at, tiny

GIB = 2**30
STATIC = ("weights", "gradients", "optimizer")


def static(made: Plan) -> tuple[int, ...]:
    return tuple(on_gpu(made)[name] for name in STATIC)


def total(made: Plan, name: str = "Qwen2.5-7B") -> int:
    return memory_plan(made, shape(name), H100S).total


def test_ddp_holds_copies_gradients_and_masters_with_moments_whole() -> None:
    assert ALL == 2888
    assert static(on_gpus()) == static(on_gpus(ranks=8)) == (2 * 2888, 4 * 2888, 12 * 2888)
    assert parts_at(on_gpus(), BACKWARD)["gathered"] == 2 * (LAYER + HEAD), "two gradients in the compute type"


def test_in_float32_the_masters_are_what_is_computed_with() -> None:
    assert static(on_gpus(dtype="float32")) == (0, 4 * 2888, 12 * 2888)


def test_without_masters_a_weight_takes_eight_bytes_and_there_is_no_copy_of_it() -> None:
    def lean(strategy: str = "ddp", **more: Any) -> Plan:
        return on_gpus(strategy, main_params="bfloat16", **more)

    assert static(lean()) == static(lean(ranks=8)) == (0, 2 * 2888, 6 * 2888)
    assert static(lean(ranks=4, dp=2, tp=2)) == (0, 2888, 3 * 2888)
    assert static(lean("fsdp", ranks=4)) == (0, 2888 // 2, 6 * 2888 // 4)
    for strategy in ("ddp", "fsdp"):
        masters = parts_at(on_gpus(strategy, ranks=4), BACKWARD)
        passing = parts_at(lean(strategy, ranks=4), BACKWARD)
        assert passing["gathered"] == masters["gathered"], "fsdp sums in float32 all the same"
        assert passing["activations"] == masters["activations"]
    assert on_host(lean("fsdp_offload", ranks=4))["offloaded"] == 8 * 2888
    assert on_host(lean())["saving"] == 12 * 2888, "a checkpoint is float32 on its way, too"


def test_zero_divides_optimizer_then_gradients_then_weights() -> None:
    assert static(on_gpus("zero1", ranks=4)) == (2 * 2888, 4 * 2888, 3 * 2888)
    assert static(on_gpus("zero2", ranks=4)) == (2 * 2888, 2888, 3 * 2888)
    assert static(on_gpus("zero3", ranks=4)) == (2888 // 2, 2888, 3 * 2888)
    assert on_gpu(on_gpus("zero2", ranks=4))["gathered"] == 2 * 2 * 2888, "two buckets"
    assert on_gpu(on_gpus("zero3", ranks=4))["gathered"] == 2 * 2 * 2888 + 2 * 2888, "and what is live"


def test_fsdp_shards_the_masters_and_gathers_two_layers_and_the_rest() -> None:
    made = on_gpus("fsdp", ranks=4)
    assert static(made) == (0, 2888, 3 * 2888)
    norm = ROOT - 2 * HEAD  # embedding and head are units: let go after use
    sums = (2 + 4) * max(LAYER, HEAD)
    assert parts_at(made, LOSS)["gathered"] == 2 * (2 * LAYER) + 2 * (norm + HEAD)
    assert parts_at(made, BACKWARD)["gathered"] == 2 * (2 * LAYER) + 2 * norm + sums, "in compute type and float32"
    assert parts_at(made, ENDS)["gathered"] == 2 * norm + 2 * (norm + HEAD) + 4 * HEAD


def test_beside_tensor_parallelism_the_head_is_gathered_until_the_end() -> None:
    made = on_gpus("fsdp", ranks=4, dp=2, tp=2)
    sums = (2 + 4) * LAYER + 2 * HEAD
    assert parts_at(made, BACKWARD)["gathered"] == (2 * (2 * LAYER) + 2 * (ROOT - HEAD) + sums) // 2
    assert parts_at(made, ENDS)["gathered"] == (2 * (ROOT - HEAD) + 2 * ROOT + 4 * HEAD) // 2


def test_gradients_that_fsdp_shards_come_in_the_only_backward_pass_of_a_step() -> None:
    made = on_gpus("fsdp", ranks=4)
    once = dataclasses.replace(made, batch=dataclasses.replace(made.batch, accumulation=1))
    assert [parts_at(once, moment)["gradients"] for moment in MOMENTS] == [0, 0, 4 * LAYER + HEAD, 2888]
    assert [parts_at(made, moment)["gradients"] for moment in MOMENTS] == [2888] * 4
    assert [parts_at(on_gpus("ddp"), moment)["gradients"] for moment in MOMENTS] == [4 * 2888] * 4


def test_replicas_share_nothing_and_tensor_ranks_share_everything() -> None:
    assert static(on_gpus("fsdp", nodes=2, ranks=4, dp_replicate=2, dp=4)) == (0, 2888, 3 * 2888)
    assert static(on_gpus("fsdp", ranks=4, dp=2, tp=2)) == (0, 2888, 3 * 2888)
    assert static(on_gpus("ddp", ranks=4, dp=2, tp=2)) == (2888, 2 * 2888, 6 * 2888)


def test_adapters_are_trained_and_the_base_is_not() -> None:
    # rank × (inputs + outputs): q and o 128, k and v 96, gate, up and down 192 each, in four layers
    adapters = 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert adapters == 4096
    assert static(on_gpus(kind="lora")) == (2 * 4096 + 2 * 2888, 4 * 4096, 12 * 4096)
    assert static(on_gpus("fsdp", "lora", ranks=4)) == (2 * 2888 // 4, 4096, 3 * 4096)


def test_named_modules_are_counted_alone() -> None:
    made = on_gpus(kind="lora")
    named = dataclasses.replace(made.tuner, target_modules=("q_proj", "v_proj"), modules_to_save=("embed_tokens",))
    adapters, embedding = 4 * (128 + 96), 32 * 8
    assert static(dataclasses.replace(made, tuner=named))[2] == 12 * (adapters + embedding)


def test_a_reward_model_has_a_score_of_the_model_s_width_and_neither_head_nor_logits() -> None:
    made = on_gpus()
    rewarding = dataclasses.replace(made, train=dataclasses.replace(made.train, objective="rm"))
    assert static(rewarding)[2] == 12 * (2888 - 32 * 8 + 8)
    assert on_gpu(rewarding)["logits"] == 0
    adapted = dataclasses.replace(on_gpus(kind="lora"), train=rewarding.train)
    assert static(adapted)[2] == 12 * (4096 + 8)
    assert static(adapted)[0] == 2 * (4096 + 8) + 2 * (2888 - 32 * 8 + 8), "peft keeps the score that was there, too"
    tokens = made.batch.global_windows * 64
    assert step_flop(made, tiny())[0] - step_flop(rewarding, tiny())[0] == 6 * tokens * 32 * 8


def test_four_bits_are_four_and_an_eighth_with_their_constants() -> None:
    matrices = 4 * (LAYER - 2 * 8)
    assert matrices == 2304
    base = round(2304 * (4 + 8 / 64 + 32 / (64 * 256)) / 8) + 2 * (2888 - 2304)
    made = on_gpus(kind="lora", quantization="nf4")
    assert static(made)[0] == 2 * 4096 + base
    constants = round(2304 * (8 / 64 + 32 / (64 * 256)) / 8)
    sharded = on_gpus("fsdp", ranks=4, kind="lora", quantization="nf4")
    assert static(sharded)[0] == (base - constants) // 4 + constants, "every rank keeps all constants"
    largest = 8 * 16
    gathered = parts_at(made, BACKWARD)["gathered"]
    assert gathered == 2 * 1024 + 2 * largest, "a gradient, and a matrix out of four bits"


def test_offloading_moves_bytes_from_the_gpus_to_their_node() -> None:
    assert static(on_gpus("fsdp_offload", ranks=4)) == (0, 0, 0)
    assert on_host(on_gpus("fsdp_offload", ranks=4))["offloaded"] == 16 * 2888
    assert on_host(on_gpus("fsdp_offload", nodes=2, ranks=4))["offloaded"] == 16 * 2888 // 2
    assert static(on_gpus("zero2_offload", ranks=4)) == (2 * 2888, 0, 0)
    assert on_host(on_gpus("zero3_offload", ranks=4))["offloaded"] == 18 * 2888
    assert on_host(on_gpus("fsdp", ranks=4))["offloaded"] == 0
    passing = [parts_at(on_gpus(f"zero3{where}", ranks=4), BACKWARD)["gathered"] for where in ("", "_offload")]
    assert passing[1] - passing[0] == 4 * LAYER, "a layer's gradients go down while the next are computed"


def test_a_node_holds_processes_and_the_copy_that_is_saved_or_the_models_that_are_read() -> None:
    assert on_host(on_gpus("fsdp", nodes=2, ranks=4)) == {
        "processes": 4 * PROCESS, "offloaded": 0, "saving": 12 * 2888 // 2,
    }  # fmt: skip
    assert "loading" not in on_host(on_gpus(ranks=4)), "weights go from their files to the GPU"
    random = on_gpus(kind="lora", nodes=2, ranks=4)
    random = dataclasses.replace(
        random,
        model=dataclasses.replace(random.model, from_scratch=True),
        tuner=dataclasses.replace(random.tuner, rank=1),
    )
    assert on_host(random)["loading"] == 2 * 2888, "rank 0 makes random ones"
    experts = dataclasses.replace(tiny(), experts=4, experts_per_token=2)
    read = dataclasses.replace(random, model=dataclasses.replace(random.model, from_scratch=False))
    parts = {part.name: part.bytes for part in host_parts(read, experts)}
    assert parts["loading"] == 2 * experts.parameters, "rank 0 joins experts"


# Bytes a token: norms 2·(4·8 + 2·8), attention 4·(8 + 4) + 4·4, feed-forward 6·16, inputs 2·(2·8 + 16)
KEPT = 96 + 64 + 96 + 64
PASSING, NORM = 4 * 2 * (16 + 8), (4 + 3 * 2) * 8  # a layer's gradients; around the last norm


@pytest.mark.parametrize(
    ("recomputation", "kept", "again"),
    [("none", 4 * KEPT, 0), ("selective", 2 * KEPT + 2 * 2 * 8, 0), ("full", 4 * 2 * 8, KEPT)],
)
def test_activations_are_those_of_kept_layers_and_one_that_is_recomputed(
    recomputation: str, kept: int, again: int
) -> None:
    assert KEPT == 320
    made = on_gpus(recomputation=recomputation)
    found = [parts_at(made, moment)["activations"] / TOKENS for moment in MOMENTS]
    assert found == [kept + NORM, kept + again + PASSING, KEPT + PASSING, 0]


# Norms' inputs and outputs 4·8, gate, up and their product 3·16, of two bytes; attention
COMPILED = 2 * (4 * 8 + 3 * 16) + 64


def test_a_compiled_layer_keeps_no_float32_copies() -> None:
    for kind, adapters, passing in (("full", 0, PASSING // 2), ("lora", 2 * 8 * 7, PASSING)):
        made = on_gpus(kind=kind)
        made = dataclasses.replace(made, train=dataclasses.replace(made.train, compiled=True))
        assert parts_at(made, BACKWARD)["activations"] == TOKENS * (4 * (COMPILED + adapters) + passing)


def test_attention_that_sees_all_scores_is_quadratic_and_the_others_are_not() -> None:
    mask = 2 * 64 * 64 * 3
    scores = (4 + 2) * 4 * 64
    repeated = 4 * 2 * 8 - 2 * 2 * (8 + 4)  # keys and values as many as queries
    flash, sdpa, eager = (parts_at(on_gpus(attention=kind), LOSS)["activations"] for kind in ("auto", "sdpa", "eager"))
    assert sdpa == flash + 4 * TOKENS * repeated + mask
    assert eager == sdpa + 4 * TOKENS * (scores - 4 * 4)
    for kind, bytes_ in (("sdpa", sdpa), ("eager", eager)):  # what auto will find is the model's word
        asks = dataclasses.replace(tiny(), attention=kind)
        assert parts_at(on_gpus(), LOSS, asks)["activations"] == bytes_


def test_dropout_of_adapters_keeps_an_input_and_a_mask_for_each() -> None:
    frozen = 64 + 64 + 96  # float32 copies of the norms, attention, feed-forward
    ranks = 2 * 8 * 7
    inputs = 3 * 8 + 8 + 2 * 8 + 16  # q, k, v; o; gate, up; down
    with_dropout, without = frozen + ranks + 3 * inputs, frozen + ranks + 2 * (2 * 8 + 16)
    for dropout, each in ((0.05, with_dropout), (0.0, without)):
        found = parts_at(on_gpus(kind="lora", dropout=dropout), BACKWARD)["activations"]
        assert found == TOKENS * (4 * each + PASSING)


def test_dropped_inputs_of_compiled_adapters_take_the_place_of_those_they_are_made_of() -> None:
    made = on_gpus(kind="lora", dropout=0.05)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, compiled=True))
    dropped, inputs = 3 * (3 * 8 + 8 + 2 * 8 + 16), 2 * (2 * 8 + 16)
    each = COMPILED + 2 * 8 * 7 + dropped - inputs
    assert parts_at(made, BACKWARD)["activations"] == TOKENS * (4 * each + PASSING)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tensor_parallel_ranks_divide_activations_but_for_what_each_gathers_behind_the_norms(kind: str) -> None:
    gathered = TOKENS * 4 * 2 * 2 * 8  # in four layers, behind two norms, eight numbers of two bytes
    one, two = (on_gpus(kind=kind, ranks=tp, dp=1, tp=tp) for tp in (1, 2))
    assert parts_at(two, BACKWARD)["activations"] == (parts_at(one, BACKWARD)["activations"] + gathered) // 2


def test_logits_exist_a_chunk_at_a_time_and_the_head_s_gradient_is_summed_beside_them() -> None:
    assert [parts_at(on_gpus(), moment)["logits"] for moment in MOMENTS] == [14 * TOKENS * 32 + 4 * HEAD, 0, 0, 0]
    many = on_gpus(kind="lora", data={"max_length": 10**6})
    assert parts_at(many, LOSS, shape("Qwen2.5-7B"))["logits"] == 14 * 768 * 152064


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_the_parts_are_those_of_the_moment_at_which_the_gpu_is_fullest(strategy: str) -> None:
    made = on_gpus(strategy, ranks=4)
    assert sum(on_gpu(made).values()) == max(sum(parts_at(made, moment).values()) for moment in MOMENTS)


def test_the_rest_is_communication_the_driver_and_gaps() -> None:
    one, mesh = on_gpu(on_gpus()), on_gpu(on_gpus("zero2", ranks=4, dp=2, tp=2))
    assert one["communication"] == 0
    assert mesh["communication"] == 2 * NCCL
    assert one["reserve"] == CONTEXT + int(FRAGMENTATION * (one["gathered"] + one["activations"] + one["logits"]))


@pytest.mark.parametrize(
    ("made", "layers"),
    [
        (on_gpus("fsdp", ranks=2), 3),  # the weights of two, one's gradients
        (on_gpus("fsdp", ranks=4, dp=2, tp=2), 3 / 2),
        (on_gpus("fsdp", ranks=2, dtype="float32"), 2 * 2),  # gradients are not read, numbers twice as long
        (on_gpus("fsdp", nodes=2, ranks=1, dp=2), 0),
    ],
)
def test_layers_that_ranks_read_from_each_other_are_communication_too(made: Plan, layers: float) -> None:
    axes = sum(axis.degree > 1 for axis in made.layout.axes)
    assert on_gpu(made)["communication"] == axes * NCCL + int(layers * 2 * LAYER)


def test_the_parts_are_the_whole() -> None:
    made = on_gpus("fsdp", ranks=4)
    memory = memory_plan(made, tiny(), H100S)
    assert memory.total == sum(on_gpu(made).values())
    assert memory.allocated == memory.total - memory.communication - memory.reserve
    assert memory.host == sum(on_host(made).values())


STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "zero2_offload", "zero3_offload", "fsdp_offload")


@pytest.mark.parametrize(("strategy", "kind"), [*itertools.product(STRATEGIES, ("full", "lora"))])
def test_more_ranks_never_hold_more_each(strategy: str, kind: str) -> None:
    sizes = [total(on_gpus(strategy, kind, nodes, 8)) for nodes in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("strategy", "kind"), [*itertools.product(STRATEGIES, ("full", "lora"))])
def test_more_recomputation_never_holds_more(strategy: str, kind: str) -> None:
    sizes = [total(on_gpus(strategy, kind, ranks=8, recomputation=r)) for r in ("none", "selective", "full")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_shards_more_holds_less(name: str) -> None:
    def held(strategy: str) -> int:
        memory = memory_plan(on_gpus(strategy, ranks=8), shape(name), H100S)
        return memory.weights + memory.gradients + memory.optimizer

    sizes = [held(strategy) for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")]
    assert sizes == sorted(sizes, reverse=True)
    assert held("fsdp_offload") == 0


def test_a_tensor_axis_holds_less_than_as_many_data_ranks() -> None:
    sizes = [total(on_gpus("fsdp", ranks=8, dp=8 // tp, tp=tp), "Qwen2.5-72B") for tp in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_seven_billion_weights_in_full_take_what_is_said_of_them() -> None:
    """16 bytes a weight over 8 ranks: 7.62e9 · 16 / 8 = 15.2e9; about as much again comes and goes."""
    memory = memory_plan(on_gpus("fsdp", ranks=8, recomputation="full"), shape("Qwen2.5-7B"), H100S)
    assert memory.gradients + memory.optimizer == pytest.approx(15.2e9, rel=0.01)
    assert 20 * GIB < memory.total < 40 * GIB


def test_the_prediction_is_compared_with_what_was_measured() -> None:
    made = on_gpus("fsdp", ranks=8)
    made = dataclasses.replace(made, memory=memory_plan(made, shape("Qwen2.5-7B"), H100S))
    assert made.memory is not None
    predicted = made.memory.allocated
    assert measured(made, round(predicted * 0.98)) == (
        f"memory: predicted {predicted / GIB:.1f} GiB, measured {0.98 * predicted / GIB:.1f} GiB (−2%)"
    )
    assert (measured(made, 2 * predicted) or "").endswith("(+100%)")
    assert measured(on_gpus(), 10**9) is None
    assert measured(made, 0) is None
