"""DeepSpeed's and FSDP's words and files: which strategy they name, what is kept, what gives way, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.aliases import SHARDING
from hpcft.config.deepspeed import WORDS
from hpcft.config.load import Loaded, load_run
from hpcft.errors import Problem, Refusal
from tests.words import complaints, plan, run, write

# The file that people bring: copied from an example, with what their command line says otherwise.
SEED_FILE: dict[str, Any] = {
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 100}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 100000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 16,
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
KEPT = {
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "contiguous_gradients": True,
        "offload_optimizer": {"pin_memory": True},
        "offload_param": {"pin_memory": True},
        "overlap_comm": True,
        "reduce_bucket_size": 500000000,
        "stage3_param_persistence_threshold": 100000,
        "sub_group_size": 1000000000,
    },
}


def file(folder: Path, content: Any, name: str = "ds.json") -> str:
    return write(folder, content if isinstance(content, str) else json.dumps(content, indent=2), name)


def zero(**section: Any) -> str:
    """A DeepSpeed file of one section, as a command line takes it."""
    return "'" + json.dumps({"zero_optimization": section}) + "'"


def wrong(line: str) -> Problem:
    """The one complaint about a command line."""
    with pytest.raises(Refusal) as caught:
        run(line)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("word", "strategy"), WORDS.items())
def test_a_word_of_deepspeed_is_a_strategy(word: str, strategy: str) -> None:
    loaded = run(f"--deepspeed {word}")
    assert loaded.run.parallel.strategy == strategy
    assert (loaded.run.parallel.deepspeed, loaded.notes) == (None, ())
    assert loaded.origins["strategy"] == "command line"


@pytest.mark.parametrize(
    ("line", "strategy"),
    [
        ("--zero_stage 2", "zero2"),
        ("--zero_stage 0", "ddp"),
        ("--deepspeed_config zero3", "zero3"),
        ("--deepspeed ZeRO3_offload", "zero3_offload"),
        ("--strategy zero0", "ddp"),
        ("--strategy fsdp2", "fsdp"),
        ("--fsdp fsdp2", "fsdp"),
        ("--fsdp", "fsdp"),
        ("--fsdp true", "fsdp"),
        ("--fsdp 'full_shard auto_wrap'", "fsdp"),
        ("--fsdp full_shard,auto_wrap", "fsdp"),
        ("--fsdp 'full_shard auto_wrap offload'", "fsdp_offload"),
        ("--fsdp 'shard_grad_op auto_wrap'", "fsdp"),
        ("--fsdp no_shard", "ddp"),
        ("--fsdp 'hybrid_shard auto_wrap' --dp_replicate 2", "fsdp"),
        ("--fsdp_version 2", "fsdp"),
        ("--fsdp fsdp2 --fsdp_config '{\"cpu_offload\": true}'", "fsdp_offload"),
        ('--fsdp_config \'{"fsdp_version": 2, "fsdp_offload_params": "true"}\'', "fsdp_offload"),
        ('--fsdp_config \'{"fsdp_cpu_offload": {"offload_params": true}}\'', "fsdp_offload"),
        ("--fsdp_sharding_strategy FULL_SHARD --fsdp_offload_params true", "fsdp_offload"),
        ("--fsdp_config '{\"sharding_strategy\": 3}'", "ddp"),
        ("--fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer", "fsdp"),
        ('--fsdp= --fsdp_config \'{"min_num_params": 0, "xla": false}\'', "ddp"),
        ("--deepspeed null --fsdp null", "ddp"),
        (f"--deepspeed {zero(stage=2, offload_optimizer={'device': 'cpu'})}", "zero2_offload"),
        (f"--deepspeed {zero(stage=2, cpu_offload=True)}", "zero2_offload"),
        (f"--deepspeed {zero(stage=3, offload_param={'device': 'none'})}", "zero3"),
        (f"--deepspeed {zero(stage='auto')}", "ddp"),
        ("--deepspeed '{}'", "ddp"),
    ],
)
def test_words_of_sharding_come_to_a_strategy(line: str, strategy: str) -> None:
    assert run(line).run.parallel.strategy == strategy


def test_the_file_that_people_bring_names_the_strategy_and_each_override_is_said_once(tmp_path: Path) -> None:
    name = file(tmp_path, SEED_FILE)
    loaded = run(f"--deepspeed {name} --torch_dtype bfloat16 --gradient_accumulation_steps 4 --learning_rate 1e-4")
    assert loaded.run.parallel.strategy == "zero3_offload"
    assert loaded.run.train.gradient_accumulation_steps == 4
    assert loaded.run.parallel.deepspeed == json.dumps(KEPT, sort_keys=True, separators=(",", ":"))
    assert list(loaded.notes) == [
        "deepspeed: zero_optimization.stage3_gather_16bit_weights_on_model_save has no effect here: "
        "checkpoints are hpcft's own",
        "deepspeed: train_micro_batch_size_per_gpu 2 gives way to per_device_train_batch_size: auto",
        "deepspeed: gradient_accumulation_steps 16 gives way to gradient_accumulation_steps: 4",
        "deepspeed: steps_per_print 2000 gives way to logging_steps: 1",
        "deepspeed: fp16 gives way to torch_dtype: bfloat16",
        "deepspeed: optimizer.params.lr 3e-05 gives way to learning_rate: 0.0001",
        "deepspeed: scheduler.type WarmupLR gives way to lr_scheduler_type: cosine",
        "deepspeed: scheduler.params.warmup_num_steps 100 gives way to warmup_steps: 0",
        "deepspeed: scheduler.params.warmup_max_lr 3e-05 gives way to learning_rate: 0.0001",
        "deepspeed: optimizer.params.betas 0.999 gives way to adam_beta2: 0.95",
    ]


def test_the_plan_carries_the_content_and_never_the_path(tmp_path: Path) -> None:
    made = plan(f"--deepspeed {file(tmp_path, SEED_FILE)}")
    assert json.loads(made.train.deepspeed) == KEPT
    assert made.train.strategy == "zero3_offload"
    assert str(tmp_path) not in made.to_json()
    renamed = plan(f"--deepspeed {file(tmp_path, dict(reversed(SEED_FILE.items())), 'other.json')}")
    assert renamed == made


def test_the_same_settings_may_stand_in_the_runs_own_yaml(tmp_path: Path) -> None:
    text = "model: m\ndataset: a.jsonl\nparallel:\n  deepspeed:\n    zero_optimization:\n      stage: 2\n"
    text += "      reduce_bucket_size: 5e8\n      overlap_com: true\n"
    (problem,) = complaints(write(tmp_path, text))
    assert (problem.where, problem.hint) == (f"{tmp_path}/run.yaml:4", "did you mean overlap_comm?")
    loaded = load_run([write(tmp_path, text.replace("overlap_com:", "overlap_comm:"))])
    assert loaded.run.parallel.strategy == "zero2"
    assert loaded.run.parallel.deepspeed == '{"zero_optimization":{"overlap_comm":true,"reduce_bucket_size":500000000}}'


def test_a_file_is_looked_for_here_and_beside_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    file(tmp_path / "project", SEED_FILE)
    yaml = write(tmp_path / "project", "model: m\ndataset: a.jsonl\ndeepspeed: ds.json\n")
    monkeypatch.chdir(tmp_path)
    assert load_run([yaml]).run.parallel.strategy == "zero3_offload"
    file(tmp_path, {"zero_optimization": {"stage": 1}})
    assert load_run([yaml]).run.parallel.strategy == "zero1"


def test_what_a_command_line_says_wins_over_the_file_of_the_run(tmp_path: Path) -> None:
    yaml = write(tmp_path, "model: m\ndataset: a.jsonl\ndeepspeed: zero3\n")
    assert load_run([yaml, "--deepspeed", "zero1"]).run.parallel.strategy == "zero1"
    assert load_run([yaml, "--deepspeed", "null"]).run.parallel.strategy == "ddp"


def test_a_stage_against_the_strategy_is_refused_and_nothing_else_is(tmp_path: Path) -> None:
    problem = wrong(f"--deepspeed {file(tmp_path, SEED_FILE)} --strategy zero2")
    assert problem.what == "strategy: zero2, but deepspeed at command line says stage 3"
    assert (problem.where, problem.choices) == ("command line", ("zero3_offload",))
    assert problem.hint == "leave out strategy, or deepspeed"
    loaded = run(f"--deepspeed {file(tmp_path, SEED_FILE)} --strategy zero3")
    assert loaded.run.parallel.strategy == "zero3"
    assert "deepspeed: zero3_offload gives way to strategy: zero3" in loaded.notes
    assert "offload" not in (loaded.run.parallel.deepspeed or "")


@pytest.mark.parametrize(
    "line", ["--strategy fsdp --deepspeed zero3", "--strategy ddp --deepspeed zero1", "--strategy zero2 --fsdp fsdp2"]
)
def test_two_strategies_are_one_too_many(line: str) -> None:
    assert "leave out strategy" in wrong(line).hint


def test_fsdp_beside_deepspeed_wins_and_that_is_said_once() -> None:
    line = "--deepspeed zero3 --fsdp 'full_shard auto_wrap' --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer"
    loaded = run(line)
    assert loaded.run.parallel.strategy == "fsdp"
    assert loaded.notes == (
        "deepspeed has no effect here: fsdp is given too, and FSDP2 is used",
        "fsdp_transformer_layer_cls_to_wrap has no effect here: each decoder layer is wrapped, as the model names it",
    )


def test_an_fsdp_file_says_the_same_as_its_map(tmp_path: Path) -> None:
    config = {"fsdp_version": 1, "cpu_offload": True, "activation_checkpointing": True, "state_dict_type": "SHARDED"}
    both = file(tmp_path, {"fsdp": "full_shard auto_wrap", "fsdp_config": config}, "fsdp.json")
    alone = file(tmp_path, config, "config.json")
    for line in (f"--fsdp {both}", f"--fsdp_config {alone}", f"--fsdp full_shard --fsdp_config {alone}"):
        loaded = run(f"{line} --gradient_checkpointing false")
        assert loaded.run.parallel.strategy == "fsdp_offload"
        assert [note.partition(": ")[2] for note in loaded.notes] == [
            "FSDP2 does the same",
            "checkpoints are hpcft's own and resume on any layout",
            "activation_checkpointing full gives way to gradient_checkpointing: none",
        ]


@pytest.mark.parametrize(
    ("content", "line", "what", "hint"),
    [
        ("", 1, "not valid JSON", "comments and a comma"),
        ('{\n  "fp16": {\n    "enabled": True\n  }\n}', 3, "not valid JSON", "comments and a comma"),
        ('{\n  // stage\n  "zero_optimization": {"stage": 3}\n}', 2, "not valid JSON", "comments and a comma"),
        ("[1]", 0, "must be a map", ""),
        ('{"fp16": {}, "fp16": {}}', 0, "fp16 is given twice", ""),
        ('{"gradient_clipping": NaN}', 0, "NaN is no number", ""),
        ('{"gradient_clipping": 1e999}', 0, "1e999 is no number", ""),
        ('{\n "zero_optimization": 3\n}', 2, "zero_optimization: must be a map", ""),
        ('{\n "zero_optimization": {\n  "stage": 4}}', 3, "zero_optimization.stage: no such stage", ""),
        ('{\n "zero_optimisation": {"stage": 3}}', 2, "no such key", "did you mean zero_optimization?"),
        ('{"zero_optimization": {\n "stage": 2,\n "overlap_com": true}}', 3, "no such key", "mean overlap_comm?"),
        ('{"zero_optimization": {\n "overlap_comm": "yes"}}', 2, "must be true or false", ""),
        ('{"zero_optimization": {\n "reduce_bucket_size": 1.5}}', 2, "must be a whole number", ""),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"},\n'
            ' "offload_optimizer": {\n"device": "nvme", "nvme_path": "/local"}}}',
            3, "offload_optimizer.device: not in this release", "device: cpu",
        ),
        ('{"zero_optimization": {\n"zero_quantized_weights": true}}', 2, "not in this release", "the loss is the same"),
        ('{"zero_optimization": {\n"zero_hpz_partition_size": 8}}', 2, "not in this release", "dp_replicate: N"),
        ('{\n"tensor_parallel": {"autotp_size": 2}}', 2, "not in this release", "with tp: N"),
        ('{"fp16": ' + '{"a": ' * 900 + "1" + "}" * 901, 0, "nested deeper", ""),
        ('{\n"curriculum_learning": {"enabled": true}}', 2, "not in this release", "seed"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said_with_its_line(
    tmp_path: Path, content: str, line: int, what: str, hint: str
) -> None:
    name = file(tmp_path, content)
    problem = wrong(f"--deepspeed {name}")
    assert what in problem.what
    assert problem.where == (f"{name}:{line}" if line else name)
    assert hint in problem.hint


def test_a_dataset_named_by_mistake_is_not_read(tmp_path: Path) -> None:
    problem = wrong(f"--deepspeed {file(tmp_path, 'x' * 1_000_001)}")
    assert "too long for a file of settings" in problem.what


def test_json_in_a_yaml_points_at_its_line(tmp_path: Path) -> None:
    (problem,) = complaints(write(tmp_path, "model: m\ndataset: a\ndeepspeed: '{\"fp16\": tru}'\n"))
    assert (problem.where, problem.value) == (f"{tmp_path}/run.yaml:3", '{"fp16": tru}')


def test_every_problem_of_a_file_is_said_at_once(tmp_path: Path) -> None:
    name = file(tmp_path, {"zzz": 1, "elasticity": {"enabled": True}, "zero_optimization": {"stage": 9, "yyy": 2}})
    assert len(complaints("--model", "m", "--dataset", "a", "--deepspeed", name)) == 4


def test_a_file_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file(tmp_path, SEED_FILE, "ds_z3_config.json")
    problem = wrong(f"--deepspeed {tmp_path}/ds_z3_confg.json")
    assert (problem.where, problem.what) == ("command line", "deepspeed: no such file")
    assert problem.hint == f"did you mean {tmp_path}/ds_z3_config.json?"
    assert wrong("--deepspeed zerro3").hint == "did you mean zero3?"
    assert wrong("--deepspeed").choices == tuple(WORDS)


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("--fsdp 'full_shrd auto_wrap'", "fsdp: no such value", "did you mean full_shard?"),
        ("--fsdp 'hybrid_shard auto_wrap'", "hybrid sharding needs the number of copies", "dp_replicate: N"),
        ("--fsdp_config '{\"ofload_params\": true}'", "ofload_params: no such key", "did you mean offload_params?"),
        ("--fsdp_config nosuch.json", "fsdp_config: no such file", "a JSON file that is there"),
        ("--zero-stage 4", "zero_stage: no such stage", ""),
        ("--zero_stage 2 --deepspeed zero2", "deepspeed says it too", "remove one"),
    ],
)
def test_what_is_wrong_with_the_words_is_said_with_the_nearest(line: str, what: str, hint: str) -> None:
    problem = wrong(line)
    assert what in problem.what
    assert hint in problem.hint


def test_offloads_that_have_no_strategy_of_their_own_run_as_the_nearest() -> None:
    first = run(f"--deepspeed {zero(stage=1, offload_optimizer={'device': 'cpu'})}")
    third = run(f"--deepspeed {zero(stage=3, offload_optimizer={'device': 'cpu'})}")
    idle = run(f"--deepspeed {zero(stage=2, offload_param={'device': 'cpu'})}")
    assert [loaded.run.parallel.strategy for loaded in (first, third, idle)] == [
        "zero2_offload",
        "zero3_offload",
        "zero2",
    ]
    assert [len(loaded.notes) for loaded in (first, third, idle)] == [1, 1, 1]


@pytest.mark.parametrize("name", SHARDING)
def test_a_word_of_sharding_is_understood_and_may_be_switched_off(name: str) -> None:
    value = "'{\"version\": 2}'" if name == "fsdp_config" else "1"
    assert run(f"--{name} {value}").run.parallel.strategy in ("fsdp", "fsdp_offload", "zero1")
    assert run(f"--{name} null").run == run().run


def spoiled(random_: random.Random, content: Any) -> Any:
    """``content`` with some of its keys and values put elsewhere, misspelt or made of another kind."""
    if isinstance(content, dict):
        items = [(key, spoiled(random_, value)) for key, value in content.items() if random_.random() < 0.8]
        return {key if random_.random() < 0.97 else key[1:]: value for key, value in items}
    odd: tuple[Any, ...] = (
        "auto",
        None,
        True,
        -1,
        0,
        2,
        3.5,
        10**20,
        "x",
        [],
        {},
        {"enabled": True},
        "\ud800\n",
        "cpu",
        [0.9],
    )
    return content if random_.random() < 0.85 else random_.choice(odd)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_stands_in_a_file_what_is_kept_of_it_is_canonical_and_decides_nothing(
    tmp_path: Path, seed: int
) -> None:
    random_ = random.Random(seed)
    read: list[Loaded] = []
    refused: list[Problem] = []
    for _ in range(150):
        name = file(tmp_path, spoiled(random_, SEED_FILE))
        try:
            read.append(run(f"--deepspeed {name}"))
        except Refusal as refusal:
            refused += refusal.problems
    assert all(problem.what and problem.where.startswith(str(tmp_path)) for problem in refused)
    kept = [json.loads(loaded.run.parallel.deepspeed or "{}") for loaded in read]
    texts = [json.dumps(content, sort_keys=True, separators=(",", ":")) for content in kept]
    assert texts == [loaded.run.parallel.deepspeed or "{}" for loaded in read]
    assert all(set(content) <= {"wall_clock_breakdown", "zero_optimization"} for content in kept)
    assert not any({"stage", "device"} & set(str(content).split("'")) for content in kept)
    assert len({loaded.run.parallel.strategy for loaded in read}) > 2
    assert all(loaded.run.train == run().run.train for loaded in read)
