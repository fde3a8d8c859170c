"""How the model is spread: every strategy plans and renders; what cannot work is refused with what would."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hpcft.catalog import STRATEGIES
from hpcft.config.load import load_run
from hpcft.errors import Refusal
from hpcft.launch.render import render
from hpcft.plan.checks import check_shape
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from hpcft.plan.replan import replan
from hpcft.plan.shape import shape_of
from hpcft.run.folder import keep_plan, make_folder, refuse_other_plan
from hpcft.run.paths import RunPaths
from tests.plan.models import QWEN3_30B_A3B, shape
from tests.words import SEED, plan, plan_complaints, profile, run, write

WITHOUT_MASTERS = "--tuner_type full --main_params_dtype bfloat16"
DEEPSPEED_FILE = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "train_batch_size": "auto"}

# Whole command lines of ms-swift, LLaMA-Factory, axolotl and Hugging Face's Trainer; ds.json is the file above.
COMMANDS = {
    "zero1": f"{SEED} --deepspeed zero1",
    "zero2": "--model_name_or_path own/er --stage sft --do_train --finetuning_type full --dataset a.json --bf16 true "
    "--deepspeed ds.json --cutoff_len 2048 --template qwen --per_device_train_batch_size 1 --ddp_timeout 180000000",
    "zero3": SEED.replace("--train_type lora", "--train_type full --deepspeed zero3 --nnodes 2"),
    "zero2_offload": SEED.replace("--train_type lora", "--tuner_type full --deepspeed zero2_offload"),
    "zero3_offload": "--base_model own/er --datasets a.jsonl --deepspeed zero3_offload --micro_batch_size 1",
    "fsdp": f"{SEED} --fsdp 'full_shard auto_wrap' --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer "
    "--deepspeed ds.json",
    "fsdp_offload": "--model own/er --dataset a.jsonl --fsdp 'full_shard auto_wrap offload' --bf16 --use_peft false",
}


@pytest.mark.parametrize(("strategy", "line"), COMMANDS.items())
def test_what_people_type_plans_and_renders(
    strategy: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, json.dumps(DEEPSPEED_FILE), "ds.json")
    loaded = load_run(shlex.split(line))
    made = make_plan(loaded.run, profile("infiniband-h100"), loaded.origins)
    assert (made.train.strategy, made.train.strategy_module) == (strategy, STRATEGIES[strategy].module)
    assert made.train.deepspeed == ('{"zero_optimization":{"overlap_comm":true}}' if strategy == "zero2" else "")
    assert Plan.from_json(made.to_json()) == made
    assert made.to_json() in render(made)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_plans_and_renders_by_its_name(strategy: str) -> None:
    made = plan(f"--strategy {strategy} --nodes 2")
    assert (made.train.strategy, made.layout.data_parallel) == (strategy, 16)
    assert f'"strategy": "{strategy}"' in render(made)


@pytest.mark.parametrize(
    ("line", "axes"),
    [
        ("--strategy ddp --tp 2", {"dp": 8, "tp": 2}),
        ("--strategy fsdp --tp 8", {"dp": 2, "tp": 8}),
        ("--strategy fsdp --dp_replicate 2", {"dp_replicate": 2, "dp": 8, "tp": 1}),
        ("--strategy fsdp_offload --dp_replicate_size 2 --tp_size 4", {"dp_replicate": 2, "dp": 2, "tp": 4}),
        ("--fsdp 'hybrid_shard auto_wrap' --dp_replicate 2", {"dp_replicate": 2, "dp": 8, "tp": 1}),
    ],
)  # fmt: skip
def test_the_axes_are_those_that_were_asked_for(line: str, axes: dict[str, int]) -> None:
    assert {axis.name: axis.degree for axis in plan(f"{line} --nodes 2").layout.axes} == axes


@pytest.mark.parametrize(
    "line",
    [
        "--quant_bits 4",
        "--quant_method bnb --quant_bits 4 --bnb_4bit_compute_dtype bfloat16 --torch_dtype bfloat16",
        "--quantization_bit 4 --quantization_method bnb --double_quantization true --finetuning_type lora",
        "--load_in_4bit --bnb_4bit_quant_type nf4 --bnb_4bit_use_double_quant true --bnb_4bit_quant_storage bfloat16",
        "--adapter qlora --load_in_4bit true",
        "--load_in_4bit true --load_in_8bit false --adapter qlora --bf16 auto",
        "--train_type qlora --strategy fsdp",
    ],
)
def test_a_quantised_base_goes_by_all_its_names(line: str) -> None:
    made = plan(line)
    assert (made.model.quantization, made.tuner.kind, made.model.dtype) == ("nf4", "lora", "bfloat16")
    assert plan().model.quantization == "none"


@pytest.mark.parametrize(
    ("line", "value", "hint"),
    [
        ("--quant_bits 8", "8", "quant_bits: 4"),
        ("--quantization_bit 8", "8", "quant_bits: 4"),
        ("--load_in_8bit", "true", "quant_bits: 4"),
        ("--quant_method gptq", "gptq", "unquantised base model, with quant_bits: 4"),
        ("--quant_method awq", "awq", "unquantised base model, with quant_bits: 4"),
        ("--quantization_method hqq", "hqq", "unquantised base model, with quant_bits: 4"),
        ("--bnb_4bit_quant_type fp4", "fp4", "nf4"),
        ("--bnb_4bit_use_double_quant false", "false", "leave it out"),
    ],
)
def test_another_quantisation_is_refused_with_the_one_there_is(line: str, value: str, hint: str) -> None:
    with pytest.raises(Refusal) as caught:
        run(line)
    (problem,) = caught.value.problems
    assert problem.value == value
    assert hint in problem.hint
    assert problem.where == "command line"


@pytest.mark.parametrize(
    ("line", "what", "choices", "hint"),
    [
        ("--strategy zero2 --tp 2", "parallel.tp: zero2 knows no such axis", ("1",), "ddp or fsdp"),
        ("--strategy zero3 --dp_replicate 2", "dp_replicate: zero3 knows no such axis", ("1",), "fsdp or fsdp_offload"),
        ("--dp_replicate 2", "parallel.dp_replicate: ddp knows no such axis", ("1",), "fsdp or fsdp_offload"),
        ("--strategy fsdp --tp 3", "tp: 3 does not divide the 8 ranks of a node", ("2", "4"), ""),
        ("--strategy fsdp --tp 16 --nodes 2", "so a tensor group would span nodes", ("8",), ""),
        ("--strategy fsdp --dp_replicate 9999999999", "copies do not divide the 8 ranks", ("8",), "copies as nodes"),
        ("--strategy fsdp --dp_replicate 3", "3 copies do not divide the 8 ranks", ("2", "4"), "copies as nodes"),
        ("--strategy fsdp --tp 2 --dp_replicate 3", "the 8 ranks / tp 2 = 4 ranks", ("2", "4"), ""),
        ("--quant_bits 4 --tuner_type full", "a quantised base is frozen", ("null",), "tuner_type: lora"),
        ("--quant_bits 4 --init_weights pissa", "pissa decomposes", ("true", "gaussian", "orthogonal"), ""),
        ("--quant_bits 4 --tp 2", "a quantised base is not split", ("null",), "tp: 1"),
        ("--quant_bits 4 --deepspeed zero3", "a quantised base is not sharded by zero3", ("null",), "ddp or fsdp"),
        ("--torch_dtype float16 --deepspeed zero2", "float16 needs its losses scaled", ("bfloat16", "float32"), "fsdp"),
        ("--tp 2 --target_modules q_proj lm_head", "target_modules: tensor parallelism splits lm_head", (), "tp: 1"),
        ("--tp 2 --modules_to_save embed_tokens", "modules_to_save: tensor parallelism splits", (), "tp: 1"),
        ("--tp 2 --modules_to_save down_proj", "modules_to_save: tensor parallelism splits down_proj", (), "tp: 1"),
        ("--tp 2 --use_dora true", "a weight's length is taken over all of it", ("false",), "strategy: fsdp"),
        ("--base_precision fp8 --use_dora true", "keeps no weights that use_dora could", ("null",), "quant_bits: 4"),
        ("--pp 2", "", (), ""),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_would(line: str, what: str, choices: tuple[str, ...], hint: str) -> None:
    (problem,) = plan_complaints(line)
    assert what in problem.what
    assert problem.choices == choices
    assert hint in problem.hint
    assert problem.where == "command line"


@pytest.mark.parametrize(
    ("tp", "sizes", "said", "choices"),
    [
        (4, (32, 8, 14336), [], ()),
        (4, (None, None, None), [], ()),
        (8, (28, 4, 18944), ["heads, 28", "key-value heads, 4"], ("4",)),
        (2, (14, 1, None), ["key-value heads, 1"], ("1",)),
        (4, (32, 8, 11006), ["feed-forward columns, 11,006"], ("2",)),
    ],
)
def test_the_tensor_degree_divides_the_shape_of_the_model(
    tp: int, sizes: tuple[int | None, int | None, int | None], said: list[str], choices: tuple[str, ...]
) -> None:
    heads, kv_heads, intermediate = sizes
    loaded = run(f"--tp {tp}")
    found = check_shape(loaded.run, loaded.origins, heads=heads, kv_heads=kv_heads, intermediate=intermediate)
    assert [problem.what.partition(" the model's number of ")[2] for problem in found] == said
    assert all(problem.choices == choices and problem.where == "command line" for problem in found)


def test_experts_are_not_cut_among_tensor_ranks() -> None:
    loaded = run("--strategy fsdp --tp 2")
    with pytest.raises(Refusal) as caught:
        make_plan(loaded.run, profile("infiniband-h100"), loaded.origins, shape_of(QWEN3_30B_A3B))
    (problem,) = caught.value.problems
    assert "128 experts" in problem.what
    assert (problem.choices, problem.where) == (("1",), "command line")


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("--nodes 2 --global_batch_size 16", ""),
        ("--strategy fsdp --tp 2", ""),
        ("--strategy fsdp --dp_replicate 2", ""),
        ("""--deepspeed '{"zero_optimization": {"stage": 3, "overlap_comm": true}}'""", ""),
        ("--per_device_train_batch_size 1", ""),
        ("--gradient_checkpointing none --torch_compile true", ""),  # what auto chooses follows the layout, too
        ("--global_batch_size 32", "batch.global_windows"),
        ("--quant_bits 4", "model.quantization"),
        (WITHOUT_MASTERS, "model.main_params_dtype"),
        ("--learning_rate 3e-4", "optim.learning_rate"),
        ("--strategy fsdp --seed 7", "train.seed"),
    ],
)
def test_a_run_submitted_again_may_be_spread_otherwise_and_computes_the_same(
    line: str, refused: str, tmp_path: Path
) -> None:
    old, new = plan("--global_batch_size 16"), plan(line if "global" in line else f"{line} --global_batch_size 16")
    paths = RunPaths(tmp_path / "run")
    make_folder(paths.root)
    keep_plan(old.to_json(), paths)
    if refused:
        with pytest.raises(Refusal, match=refused) as caught:
            refuse_other_plan(new, paths)
        assert "layout" not in str(caught.value)
        assert "strategy" not in str(caught.value)
    else:
        refuse_other_plan(new, paths)


@pytest.mark.parametrize(
    "line", ["", "--tp 2", "--strategy fsdp", "--strategy fsdp --tp 2 --dp_replicate 2", "--strategy fsdp_offload"]
)
def test_weights_and_moments_may_be_bfloat16_where_no_masters_are_needed(line: str) -> None:
    made = plan(f"{WITHOUT_MASTERS} {line}")
    assert (made.model.dtype, made.model.main_params_dtype) == ("bfloat16", "bfloat16")
    assert plan(line).model.main_params_dtype == "float32"


@pytest.mark.parametrize("line", ["--main_params_dtype bf16", "--pure_bf16 true"])
def test_weights_without_masters_are_computed_with_as_they_are_on_cpus_too(line: str) -> None:
    made = plan(f"--tuner_type full {line}", "local")
    assert (made.model.dtype, made.model.main_params_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ("--tuner_type lora", "tuner_type: lora trains adapters, which are small, and float32", "tuner_type: full"),
        ("--tuner_type lora --quant_bits 4", "tuner_type: lora trains adapters", "tuner_type: full"),
        *(
            (f"--tuner_type full --strategy {name}", f"is not for {name}, which keeps float32 masters", "ddp or fsdp")
            for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
        ),
        ("--tuner_type full --torch_dtype float16", "but torch_dtype is float16", "torch_dtype: bfloat16"),
        ("--tuner_type full --torch_dtype float32", "but torch_dtype is float32", "torch_dtype: bfloat16"),
    ],
)
def test_what_needs_float32_masters_is_refused_without_them(line: str, said: str, hint: str) -> None:
    [problem] = plan_complaints(f"--main_params_dtype bfloat16 {line}")
    assert problem.what.startswith("model.main_params_dtype: bfloat16")
    assert said in problem.what
    assert (problem.where, problem.value, problem.choices) == ("command line", "bfloat16", ("float32",))
    assert hint in problem.hint


def test_a_run_without_masters_does_not_go_on_under_a_strategy_that_has_them() -> None:
    made = plan(f"{WITHOUT_MASTERS} --strategy fsdp")
    assert replan(made, strategy="ddp").model == made.model
    with pytest.raises(Refusal, match="zero2, which keeps float32 masters"):
        replan(made, strategy="zero2")


@pytest.mark.parametrize("line", ["--strategy zero3", "--strategy zero3_offload"])
def test_layers_whose_weights_come_and_go_inside_are_not_compiled(line: str) -> None:
    assert not plan(line).train.compiled
    [problem] = plan_complaints(f"{line} --torch_compile true")
    assert "train.torch_compile" in problem.what
    assert problem.hint


def test_compiled_layers_are_asked_for_in_hugging_face_s_word() -> None:
    assert plan("--strategy fsdp --torch_compile").train.compiled
    assert not plan("--strategy fsdp --torch_compile false").train.compiled


@pytest.mark.parametrize(
    ("line", "compiled"),
    [
        ("--strategy fsdp", True),
        ("--strategy ddp --deterministic true", False),
        ("--strategy ddp --packing false", False),
        ("--strategy zero3", False),
        ("--strategy fsdp --tp 2", True),
    ],
)
def test_layers_are_compiled_where_that_pays(line: str, compiled: bool) -> None:
    assert plan(line).train.compiled is compiled


def test_what_was_compiled_goes_on_without_where_it_cannot_be() -> None:
    assert not replan(plan("--strategy fsdp --torch_compile true"), strategy="zero3").train.compiled


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--tuner_type full", "is frozen, but tuner_type: full trains it"),
        ("--strategy zero2", "is not sharded by zero2"),
        ("--strategy fsdp --tp 2", "is not split among tensor ranks"),
        ("--torch_dtype float16", "multiplied in bfloat16"),
        ("--quant_bits 4", "the base is in 4 bits already"),
        ("--init_weights pissa", "pissa decomposes the base"),
    ],
)
def test_what_a_base_in_eight_bits_cannot_do_is_refused_with_the_alternative(line: str, said: str) -> None:
    problems = plan_complaints(f"--base_precision fp8 {line}")
    assert any(said in problem.what and problem.choices for problem in problems)


def test_a_base_in_eight_bits_takes_half_the_memory_of_one_in_bfloat16() -> None:
    sizes = {}
    for words in ("", "--base_precision fp8"):
        loaded = run(f"--gradient_checkpointing full {words}")
        made = make_plan(loaded.run, profile("infiniband-h100"), loaded.origins, shape("Qwen2.5-7B"))
        assert made.memory is not None
        sizes[words] = made.memory.weights
    embeddings = 2 * 2 * 152064 * 3584
    assert sizes["--base_precision fp8"] - embeddings == pytest.approx((sizes[""] - embeddings) / 2, rel=0.01)
