"""``strategy: auto``, and what is refused because it would not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft.catalog import STRATEGIES
from hpcft.errors import Problem, Refusal
from hpcft.plan.activations import LOSS, chunk_rows, logit_rows
from hpcft.plan.auto import TIE
from hpcft.plan.explain import explain
from hpcft.plan.make import make_plan
from hpcft.plan.memory import gpu_parts_at
from hpcft.plan.plan import RECOMPUTATION, Plan
from hpcft.plan.prediction import MemoryPlan, Option
from hpcft.plan.replan import replan
from hpcft.plan.ways import fits, pace, ways
from tests.decisions import CARDS, LAYOUTS, MODELS, TUNERS, decided
from tests.plan.models import PUBLISHED, shape
from tests.words import profile, run

H100, A100, H200 = "H100, 80 GB", "A100, 40 GB", "H200, 141 GB"


def planned(line: str, name: str = "Qwen2.5-7B", cluster: str = "infiniband-h100", **profile_says: Any) -> Plan:
    """The Plan of a run whose model has the shape of ``name``."""
    loaded = run(line)
    return make_plan(loaded.run, profile(cluster).model_copy(update=profile_says), loaded.origins, shape(name))


def refused(line: str, name: str = "Qwen2.5-7B", **profile_says: Any) -> Problem:
    with pytest.raises(Refusal) as caught:
        planned(line, name, **profile_says)
    (problem,) = caught.value.problems
    return problem


def offloads(option: Option) -> bool:
    return bool(STRATEGIES[option.strategy].offload)


def memory(plan: Plan) -> MemoryPlan:
    assert plan.memory is not None
    return plan.memory


@pytest.mark.parametrize(
    ("model", "tuner", "layout", "card", "strategy", "tp"),
    [
        ("0.5B", "lora", (1, 1), H100, "ddp", 1),
        ("0.5B", "full", (1, 8), H100, "ddp", 1),
        ("7B", "lora", (8, 8), H100, "ddp", 1),
        ("7B", "full", (1, 8), H100, "fsdp", 1),
        ("7B", "full", (1, 1), H100, "zero2_offload", 1),
        ("72B", "lora", (1, 8), H100, "fsdp", 1),
        ("72B", "lora", (1, 1), H100, "fsdp_offload", 1),
        ("72B", "qlora", (1, 1), H100, "ddp", 1),
        ("72B", "full", (8, 8), H100, "fsdp", 1),
        ("72B", "full", (8, 8), A100, "fsdp", 1),
    ],
)
def test_well_known_runs_are_spread_as_people_spread_them(
    model: str, tuner: str, layout: tuple[int, int], card: str, strategy: str, tp: int
) -> None:
    made = decided(model, tuner, layout, card)
    assert (made.train.strategy, made.layout.degree("tp")) == (strategy, tp)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_whatever_is_decided_fits_and_nothing_that_fits_is_much_faster(tuner: str, layout: tuple[int, int]) -> None:
    for model in MODELS:
        for card in CARDS:
            try:
                made = decided(model, tuner, layout, card)
            except Refusal:
                continue
            assert fits(made)
            chosen, *others = memory(made).options
            alike = [other for other in others if offloads(chosen) or not offloads(other)]
            batches = [other.seconds for other in alike if other.fits and other.seconds]
            assert chosen.seconds is not None
            assert not offloads(chosen) or not any(other.fits and not offloads(other) for other in others)
            assert chosen.seconds <= min(batches, default=chosen.seconds) * TIE * 1.001
            assert made.layout.ranks_per_node % made.layout.degree("tp") == 0


def test_what_fits_on_a_small_card_fits_on_a_larger_one_and_is_no_slower_there() -> None:
    for model in MODELS:
        small, large = (decided(model, "lora", (1, 8), card) for card in (H100, H200))
        assert pace(large) <= pace(small) * TIE


def test_of_equals_the_simpler_one_is_taken() -> None:
    made = planned("--strategy auto", "Qwen2.5-0.5B", gpu_type="unknown", gpu_memory=80)
    assert made.train.strategy == "ddp"
    assert "the speed of this GPU is not known" in memory(made).reason


def test_a_slow_fabric_keeps_the_shards_in_a_node() -> None:
    line = "--strategy auto --nodes 2 --tuner_type full --global_batch_size 64"
    fast, slow = (planned(line, "Qwen2.5-7B", fabric_bandwidth=b) for b in (370, 5))
    assert fast.layout.degree("dp_replicate") == 1
    assert (slow.train.strategy, slow.layout.degree("dp_replicate")) == ("fsdp", 2)
    assert slow.layout.degree("dp") == slow.layout.ranks_per_node


def test_a_tensor_axis_divides_heads_and_never_leaves_its_node() -> None:
    on_two = planned("--strategy fsdp --nodes 2 --tuner_type full")
    found = {way.tp for way in ways(on_two, shape("Qwen2.5-7B"))}
    assert found == {1, 2, 4}, "4 key heads"
    assert {way.tp for way in ways(planned(""), shape("Qwen2.5-7B"))} == {1}, "adapters are not cut"
    unknown = dataclasses.replace(shape("Qwen2.5-7B"), cut_by_tensor=False)
    assert {way.tp for way in ways(on_two, unknown)} == {1}, "nor what nobody has seen cut right"


def test_the_page_tells_why_and_what_else_there_was() -> None:
    made = planned("--strategy auto --tuner_type full")
    page = explain(made, None, {})
    assert "auto: fsdp: " in page
    assert "the fastest of " in page
    assert page.count("then ") == len(memory(made).options) - 1 == 3
    assert "strategy    auto" in page


def test_the_page_shows_memory_as_parts_of_the_card() -> None:
    made = planned("--strategy fsdp --tuner_type full")
    page = explain(made, None, {})
    assert f"predicted {memory(made).total / 2**30:.1f} GiB a GPU of 78.8" in page
    assert "optimizer       10.6  ###                       12 B × 7.62 B trained / 8\n" in page
    assert "cheaper     next is fsdp, tp 2: " in page
    assert not [line for line in page.splitlines() if line != line.rstrip()]
    assert "\x1b" not in page


def test_nothing_fits_is_said_with_arithmetic_and_the_smallest_layout_that_does() -> None:
    problem = refused(
        "--strategy auto --tuner_type full --nproc_per_node 4", "Qwen2.5-72B", gpu_memory=40, node_memory=512
    )
    assert "does not fit on 1 × 4 GPUs" in problem.what
    assert " GiB a GPU of 39.4" in problem.what or " GiB a node of 512.0" in problem.what
    assert "72.71 B trained" in problem.value
    assert any(choice.startswith("8 × 8 GPUs with fsdp") for choice in problem.choices)
    assert any(choice.startswith("tuner_type: lora") for choice in problem.choices)
    assert problem.where == "command line"


def test_the_layout_that_a_refusal_names_does_fit() -> None:
    problem = refused("--strategy auto --tuner_type full", "Qwen2.5-72B", node_memory=512)
    (choice,) = [choice for choice in problem.choices if "GPUs with" in choice]
    nodes, _, per_node = choice.partition(" GPUs")[0].split()
    made = planned(
        f"--strategy auto --tuner_type full --nodes {nodes} --nproc_per_node {per_node}", "Qwen2.5-72B", node_memory=512
    )
    assert fits(made)


def test_a_named_strategy_that_is_clearly_too_large_is_refused_with_the_next_that_fits() -> None:
    problem = refused("--strategy ddp --tuner_type full")
    assert "with ddp does not fit on 1 × 8 GPUs: " in problem.what
    assert "optimizer 85.1 GiB = 12 B × 7.62 B trained" in problem.value
    assert problem.choices[0].startswith("fsdp (")


def test_without_full_recomputation_that_is_the_hint() -> None:
    line = "--strategy ddp --tuner_type full --gradient_checkpointing none --per_device_train_batch_size 4"
    assert "gradient_checkpointing: full" in refused(line).hint


def test_a_named_strategy_that_is_hardly_too_large_is_let_through_and_the_page_says_so() -> None:
    line = "--tuner_type full --gradient_checkpointing full"
    full = memory(planned(line, gpu_memory=500)).total / 2**30 / 0.985
    made = planned(line, gpu_memory=full / 1.03)
    assert made.train.strategy == "ddp"
    assert "close, and predictions err" in explain(made, None, {})
    refused("--tuner_type full", gpu_memory=full / 1.10)


def test_offloading_more_than_the_node_has_is_refused_with_arithmetic() -> None:
    problem = refused("--strategy fsdp_offload --tuner_type full", "Qwen2.5-72B", node_memory=512)
    assert "GiB a node of 512.0" in problem.what
    assert "offloaded 1083.4 GiB" in problem.value
    assert planned("--strategy fsdp_offload --tuner_type full", "Qwen2.5-72B").train.strategy == "fsdp_offload"


def test_offloading_to_a_node_of_unknown_memory_is_done_when_asked_for_and_never_chosen() -> None:
    words = "--tuner_type full --nproc_per_node 1"
    assert planned(f"--strategy auto {words}").train.strategy == "fsdp_offload"
    problem = refused(f"--strategy auto {words}", node_memory=None)
    assert "node_memory" in problem.hint
    assert "with fsdp does not fit" in problem.what
    assert planned(f"--strategy zero2_offload {words}", node_memory=None).train.strategy == "zero2_offload"
    page = explain(planned("--strategy auto --tuner_type full --nproc_per_node 2", node_memory=None), None, {})
    assert re.search(r"then zero\d_offload: .*, node_memory is not known\n", page)


def test_fewer_windows_go_through_a_forward_pass_where_they_do_not_fit() -> None:
    line = "--nproc_per_node 1 --global_batch_size 8 --gradient_checkpointing none --max_length 4096"
    roomy, tight = planned(line, gpu_memory=200), planned(line, gpu_memory=60)
    assert (roomy.batch.micro_windows, roomy.batch.accumulation) == (4, 2)
    assert (tight.batch.micro_windows, tight.batch.accumulation) == (1, 8)
    assert roomy.batch.global_windows == tight.batch.global_windows
    assert fits(tight)


@pytest.mark.parametrize("said", ["--per_device_train_batch_size 2", "--gradient_accumulation_steps 4"])
def test_how_many_windows_is_not_changed_where_it_was_said(said: str) -> None:
    line = f"--nproc_per_node 1 --global_batch_size 8 --gradient_checkpointing none --max_length 4096 {said}"
    with pytest.raises(Refusal, match="does not fit"):
        planned(line, gpu_memory=60)


def test_auto_without_a_shape_or_a_card_names_the_strategies_and_what_is_missing() -> None:
    loaded = run("--strategy auto")
    with pytest.raises(Refusal, match="shape of m is not known") as caught:
        make_plan(loaded.run, profile("infiniband-h100"), loaded.origins)
    assert "fsdp" in caught.value.problems[0].choices
    assert "gpu_memory" in refused("--strategy auto", gpu_type="a100").hint


def test_on_cpus_auto_is_the_simplest_and_memory_is_not_foretold() -> None:
    made = planned("--strategy auto", cluster="local")
    assert (made.train.strategy, made.memory) == ("ddp", None)


def test_without_masters_only_what_can_do_without_them_is_weighed() -> None:
    lean = "--strategy auto --tuner_type full --main_params_dtype bfloat16 --nproc_per_node 1"
    weighed = memory(planned(lean, "Qwen2.5-14B", node_memory=2000)).options
    assert {option.strategy for option in weighed} == {"ddp", "fsdp", "fsdp_offload"}
    problem = refused(lean, "Qwen2.5-14B", node_memory=None, max_nodes=1, gpus_per_node=1)
    assert any("tuner_type: lora and main_params_dtype: float32 with" in choice for choice in problem.choices)


def test_seven_billion_weights_without_masters_are_trained_whole_on_one_card() -> None:
    made = planned("--tuner_type full --main_params_dtype bfloat16 --nproc_per_node 1")
    assert fits(made)
    assert "does not fit" in refused("--tuner_type full --nproc_per_node 1").what


def test_degrees_that_were_asked_for_are_kept() -> None:
    made = planned("--strategy auto --tuner_type full --tp 2")
    assert (made.train.strategy, made.layout.degree("tp")) == ("fsdp", 2)
    assert "no way with these degrees" in refused("--strategy auto --tp 2").what


def test_a_batch_that_does_not_divide_is_refused_as_ever() -> None:
    assert "12 windows do not divide among 8 ranks" in refused("--strategy auto --global_batch_size 12").what


def test_a_plan_with_memory_is_read_back_as_it_was() -> None:
    made = planned("--strategy auto --tuner_type full")
    assert Plan.from_json(made.to_json()) == made


def test_a_plan_of_the_second_schema_has_as_many_logits_at_a_time_as_is_usual() -> None:
    old = json.loads(planned("--tuner_type full --strategy fsdp").to_json())
    del old["train"]["loss_chunk"]
    assert Plan.from_json(json.dumps({**old, "schema": 2})).train.loss_chunk == 0


def test_a_plan_of_the_first_schema_has_no_memory() -> None:
    old = json.loads(planned("").to_json())
    del old["memory"], old["model"]["quantization"], old["train"]["deepspeed"]
    assert Plan.from_json(json.dumps({**old, "schema": 1})).memory is None


def test_another_layout_is_foretold_anew_and_the_same_one_is_not() -> None:
    old = planned("--strategy auto --tuner_type full --nodes 2 --global_batch_size 64")
    assert replan(old) == old
    new = replan(old, nodes=1)
    assert memory(new).optimizer > memory(old).optimizer
    assert memory(new).options == ()


def test_hub_names_have_no_shape_and_local_folders_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcft.cli.common import plan_run

    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", "config.json").write_text(json.dumps(PUBLISHED["Qwen2.5-7B"][0]))
    words = ["--dataset", "a.jsonl", "--cluster", "infiniband-h100", "--model"]
    assert plan_run([*words, "own/er"]).plan.memory is None
    assert memory(plan_run([*words, "./model"]).plan).shape == shape("Qwen2.5-7B")


def test_choosing_takes_a_moment() -> None:
    started = time.process_time()  # what the neighbours on the machine take does not count
    planned("--strategy auto --tuner_type full --nodes 2", "Qwen2.5-72B")
    assert time.process_time() - started < 0.3


def test_as_little_is_recomputed_as_the_card_allows() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --max_length 4096 --global_batch_size 16"
    levels = [planned(line, gpu_memory=gib).train.recomputation for gib in (141, 60, 45, 32)]
    assert levels[0] == "none"
    assert levels[-1] == "full"
    assert levels == sorted(levels, key=RECOMPUTATION.index)


def test_a_level_that_was_said_is_kept_whatever_the_card() -> None:
    for level in RECOMPUTATION:
        assert planned(f"--gradient_checkpointing {level}", gpu_memory=141).train.recomputation == level


def test_where_the_card_is_not_known_everything_is_recomputed_and_the_batch_is_the_usual_one() -> None:
    made = planned("--max_length 4096 --global_batch_size 64", gpu_type="unknown")
    assert (made.train.recomputation, made.batch.micro_windows) == ("full", 2)


def test_more_logits_exist_at_a_time_where_the_head_is_trained_and_the_card_has_room() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --max_length 4096 --global_batch_size 64"
    line += " --gradient_checkpointing full --per_device_train_batch_size 2"
    usual = chunk_rows(152064)
    roomy, close, tight = (planned(line, gpu_memory=gib) for gib in (60, 28, 25))
    assert [plan.train.loss_chunk for plan in (roomy, close, tight)] == [4 * usual, 2 * usual, 0]
    assert memory(close).total <= 0.9 * 28 * 2**30
    assert f"{4 * usual:,} rows" in "\n".join(
        part.arithmetic for part in gpu_parts_at(roomy, memory(roomy).shape, LOSS)
    )


@pytest.mark.parametrize(
    "words", ["--tuner_type lora", "--tuner_type full --max_length 256 --per_device_train_batch_size 1"]
)
def test_more_logits_at_a_time_are_not_asked_for_where_nothing_comes_of_them(words: str) -> None:
    line = f"{words} --strategy fsdp --nproc_per_node 8 --global_batch_size 64"
    assert planned(line, gpu_memory=141).train.loss_chunk == 0


@pytest.mark.parametrize("rows", [100, 5000])
def test_as_many_logits_at_a_time_as_a_person_says(rows: int) -> None:
    line = f"--tuner_type full --strategy fsdp --nproc_per_node 8 --max_length 4096 --loss_chunk {rows}"
    made = planned(line, gpu_memory=141)
    assert made.train.loss_chunk == rows
    assert logit_rows(made, memory(made).shape) == rows
    assert planned(line, gpu_type="unknown").train.loss_chunk == rows


def test_on_another_layout_there_are_no_more_logits_at_a_time_than_usual() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --nodes 2 --max_length 4096 --global_batch_size 64"
    more = planned(line, gpu_memory=80)
    assert more.train.loss_chunk > chunk_rows(152064)
    assert replan(more) == more
    assert replan(more, nodes=1, nproc_per_node=4).train.loss_chunk == 0, "masters of twice the GPUs are on each"
    said = planned(f"{line} --loss_chunk 1000", gpu_memory=80)
    assert replan(said, nodes=4).train.loss_chunk == 1000
    few = planned(f"{line} --loss_chunk 100", gpu_memory=80)
    assert replan(few, nodes=1, nproc_per_node=4).train.loss_chunk == 100


def test_on_smaller_cards_what_only_needs_room_goes_before_anything_is_recomputed() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --max_length 4096 --global_batch_size 64"
    roomy = planned(f"{line} --gradient_checkpointing full --per_device_train_batch_size 2", gpu_memory=60)
    assert (roomy.train.loss_chunk, roomy.train.resharding) == (4 * chunk_rows(152064), False)
    small = replan(roomy, cluster=profile("infiniband-h100").model_copy(update={"gpu_memory": 28}))
    assert (small.train.loss_chunk, small.train.resharding) == (0, True)
    assert fits(small)


def test_gathered_weights_stay_where_there_is_memory_for_them_and_a_network_to_spare() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --nodes 2 --max_length 4096 --global_batch_size 32"
    roomy, tight = planned(line, gpu_memory=141), planned(line, gpu_memory=48)
    assert (roomy.train.resharding, tight.train.resharding) == (False, True)
    assert "28 layers of" in explain(roomy, None, {})
    assert memory(roomy).gathered - memory(tight).gathered == pytest.approx(26 * 0.434 * 2**30, rel=0.01)


def test_on_another_layout_nothing_stays_gathered_before_it_is_weighed_anew() -> None:
    line = "--tuner_type full --strategy fsdp --nproc_per_node 8 --nodes 2 --max_length 4096 --global_batch_size 32"
    roomy = planned(line, gpu_memory=141)
    assert replan(roomy) == roomy
    assert replan(roomy, nodes=1).train.resharding


def test_on_smaller_cards_more_is_recomputed() -> None:
    line = "--tuner_type lora --nproc_per_node 8 --max_length 4096 --global_batch_size 32"
    roomy = planned(line, gpu_memory=141)
    small = profile("infiniband-h100").model_copy(update={"gpu_memory": 40})
    assert roomy.train.recomputation == "none"
    assert replan(roomy, cluster=small).train.recomputation == "full"
