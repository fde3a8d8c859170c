"""make_plan: what a run and a cluster come to, and what does not fit together."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hpcft.catalog import OBJECTIVES, STRATEGIES
from hpcft.config.cluster import PrepareJob
from hpcft.config.load import load_run
from hpcft.errors import Refusal
from hpcft.launch.render import render
from hpcft.plan.make import make_plan, source_of
from hpcft.plan.plan import Plan, Source
from hpcft.run.expand import run_folder
from tests.words import PROFILES, SEED, STARTERS, plan, plan_complaints, profile, run, starter


def from_words(line: str, cluster: str) -> Plan:
    """The Plan of a command line to which nothing is added."""
    loaded = load_run(shlex.split(line))
    return make_plan(loaded.run, profile(cluster), loaded.origins)


def test_the_seeds_command_line_means_here_what_it_means_there() -> None:
    made = from_words(SEED, "infiniband-h100")
    assert made.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (made.model.source, made.model.dtype) == ("huggingface", "bfloat16")
    assert (made.tuner.kind, made.tuner.rank, made.tuner.alpha) == ("lora", 8, 32.0)
    assert made.tuner.target_modules == ("all-linear",)
    assert made.data.train == (
        Source(path="AI-ModelScope/alpaca-gpt4-data-zh", rows=500, source="modelscope"),
        Source(path="AI-ModelScope/alpaca-gpt4-data-en", rows=500, source="modelscope"),
        Source(path="swift/self-cognition", rows=500, source="modelscope"),
    )
    assert (made.data.system, made.data.model_name) == ("You are a helpful assistant.", "swift-robot")
    assert (made.data.model_author, made.data.max_length) == ("swift", 2048)
    assert (made.batch.micro_windows, made.batch.accumulation, made.batch.global_windows) == (1, 8, 16)
    assert (made.optim.learning_rate, made.optim.warmup_ratio, made.optim.num_train_epochs) == (1e-4, 0.05, 1.0)
    assert (made.checkpoint.save_steps, made.checkpoint.keep, made.train.logging_steps) == (50, 2, 5)
    assert (made.layout.world_size, made.resources.gpus_per_node, made.folders.runs) == (2, 2, "output")
    assert (made.train.strategy, made.train.dataloader_workers, made.batch.eval_windows) == ("ddp", 4, 1)


@pytest.mark.parametrize("cluster", [name for name in PROFILES if profile(name).gpus_per_node])
def test_the_seeds_command_line_plans_on_every_gpu_cluster(cluster: str) -> None:
    made = from_words(SEED.replace("infiniband-h100", cluster), cluster)
    assert (made.batch.global_windows, made.layout.world_size) == (16, 2)


def test_a_llama_factory_run_plans_as_it_is() -> None:
    words = """
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --stage sft --do_train --finetuning_type lora --lora_rank 8
        --lora_target all --dataset identity.json,alpaca.json --template qwen --cutoff_len 2048 --overwrite_cache
        --preprocessing_num_workers 16 --output_dir saves/lora --logging_steps 10 --save_steps 500 --plot_loss
        --overwrite_output_dir --save_only_model false --report_to none --per_device_train_batch_size 1
        --gradient_accumulation_steps 8 --learning_rate 1.0e-4 --num_train_epochs 3.0 --lr_scheduler_type cosine
        --warmup_ratio 0.1 --bf16 true --resume_from_checkpoint null --val_size 0.1 --per_device_eval_batch_size 1
        --eval_strategy steps --eval_steps 500
    """
    made = from_words(words, "infiniband-h100")
    assert [source.path for source in made.data.train] == ["identity.json", "alpaca.json"]
    assert (made.model.dtype, made.tuner.target_modules, made.data.workers) == ("bfloat16", ("all-linear",), 16)
    assert (made.data.validation_ratio, made.train.eval_steps, made.batch.global_windows) == (0.1, 500, 64)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("Qwen/Qwen2.5-7B", "huggingface"),
        ("gpt2", "local"),
        ("AI-ModelScope/alpaca-gpt4-data-zh", "modelscope"),
        ("swift/self-cognition", "modelscope"),
        ("./models/tiny", "local"),
        ("../models/tiny", "local"),
        ("/data/models/x", "local"),
        ("~/models/x", "local"),
        ("$SCRATCH/models/x", "local"),
        ("${SCRATCH}/models/x", "local"),
        ("data/train.jsonl", "local"),
        ("data/train.json", "local"),
        ("data/train.csv", "local"),
        ("data/train.parquet", "local"),
        ("data/train.jsonl.gz", "local"),
        ("data/train.tsv", "local"),
        ("data/train.tsv.gz", "local"),
        ("data/TRAIN.JSONL", "local"),
        ("data/train.jsonl.zst", "local"),
        ("owner/zst", "huggingface"),
        ("a/b/c", "local"),
        ("my folder/x", "local"),
        ("own.er/na-me_2.5", "huggingface"),
        ("own/er:subset", "huggingface"),
    ],
)
def test_a_name_says_where_it_is_from(name: str, source: str) -> None:
    assert source_of(name, use_hf=True) == source
    assert source_of(name, use_hf=False) == ("modelscope" if source == "huggingface" else source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", Source(path="a.jsonl")),
        ("a.jsonl#500", Source(path="a.jsonl", rows=500)),
        ("a#b.jsonl#7", Source(path="a#b.jsonl", rows=7)),
        ("own/er#5", Source(path="own/er", rows=5, source="huggingface")),
        ("own/er:en#5", Source(path="own/er", rows=5, source="huggingface", subset="en")),
        ("MS::own/er", Source(path="own/er", source="modelscope")),
        ("HF::AI-Lab/x", Source(path="AI-Lab/x", source="huggingface")),
        ("dir #1/a b.jsonl", Source(path="dir #1/a b.jsonl")),
    ],
)
def test_a_dataset_word_is_taken_apart(text: str, expected: Source) -> None:
    loaded = load_run(["--model", "m", "--dataset", text])
    assert make_plan(loaded.run, profile("local")).data.train == (expected,)


@pytest.mark.parametrize("text", ["a.jsonl#", "a.jsonl#x", "a.jsonl#0", "a.jsonl#-5", "a.jsonl#1.5", f"a#{'9' * 40}"])
def test_a_number_of_rows_that_is_none_is_refused_with_an_example(text: str) -> None:
    (problem,) = plan_complaints(f"--val_dataset '{text}'", "local")
    assert problem.value == text
    assert problem.hint.endswith("#500")


def test_what_was_not_said_follows_from_the_cluster() -> None:
    on_gpus, on_cpus = plan(cluster="infiniband-h100"), plan(cluster="local")
    assert (on_gpus.model.dtype, on_cpus.model.dtype) == ("bfloat16", "float32")
    assert (on_gpus.resources.backend, on_cpus.resources.backend) == ("nccl", "gloo")
    assert (on_gpus.layout.world_size, on_cpus.layout.world_size) == (8, 1)
    assert (on_gpus.resources.time_minutes, on_cpus.resources.time_minutes) == (1440, 4320)
    assert on_gpus.resources.partition == "gpu"


def test_what_was_said_wins_over_the_profile() -> None:
    made = plan("--nodes 2 --nproc_per_node 4 --time 2h --partition scavenge --account other --qos q --exclusive")
    r = made.resources
    assert (r.nodes, r.tasks_per_node, r.gpus_per_node, r.time_minutes) == (2, 4, 4, 120)
    assert (r.partition, r.account, r.qos, r.exclusive, r.preemption) == ("scavenge", "other", "q", True, "requeue")


def test_a_rank_gets_its_gpus_share_of_the_cores_however_many_ranks_there_are() -> None:
    assert {plan(f"--nproc_per_node {n}").resources.cpus_per_task for n in (1, 2, 8)} == {12}
    assert plan("--nproc_per_node 2", "loopback").resources.cpus_per_task == 2


@pytest.mark.parametrize("leaf", ["learning_rate", "weight_decay", "adam_epsilon"])
def test_a_factor_that_float32_does_not_hold_is_refused_before_a_rank_meets_it(leaf: str) -> None:
    (problem,) = plan_complaints(f"--{leaf} 1e99")
    assert problem.what.startswith(f"train.{leaf}: too large")
    assert problem.where == "command line"


def test_the_learning_rate_follows_the_tuner() -> None:
    assert plan("--tuner_type lora").optim.learning_rate == 1e-4
    assert plan("--tuner_type full").optim.learning_rate == 1e-5
    assert plan("--tuner_type full --lr 3e-3").optim.learning_rate == 3e-3


def test_evaluation_follows_the_data() -> None:
    assert plan("--eval_steps 7").train.eval_steps == -1, "there is nothing to evaluate on"
    assert plan("--val_dataset b.jsonl --save_steps 9").train.eval_steps == 9
    assert plan("--val_dataset b.jsonl --eval_steps 7").train.eval_steps == 7


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "m-lora"),
        ("--tuner_type full", "m-full"),
        ("--name mine", "mine"),
    ],
)
def test_a_run_has_a_name(line: str, name: str) -> None:
    assert plan(line).name == name


def test_a_model_in_a_home_is_refused_before_its_data_is_prepared() -> None:
    loaded = load_run(["--model", "~/models/x", "--dataset", "a"])
    with pytest.raises(Refusal, match="nobody reads ~ on the way to the job") as refused:
        make_plan(loaded.run, profile("local"), loaded.origins)
    (problem,) = refused.value.problems
    assert (problem.where, problem.value) == ("command line", "~/models/x")
    assert "write the folder out" in problem.hint


def test_a_home_in_a_folder_is_left_to_the_shell_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = profile("local").model_copy(update={"store": "~/prepared", "hf_home": "~/hf"})
    loaded = load_run(["--model", "a/b", "--dataset", "~/data/a.jsonl", "--output_dir", "~/runs", "--name", "mine"])
    made = make_plan(loaded.run, cluster, loaded.origins)
    assert (made.folders.runs, made.folders.store) == ("$HOME/runs", "$HOME/prepared")
    assert {v.name: v.value for v in made.environment}["HF_HOME"] == "$HOME/hf"
    assert "HPCFT_RUN:-$HOME/runs/mine}" in render(made).replace('"', "")
    monkeypatch.setenv("HOME", "/home/me")
    assert run_folder(made) == Path("/home/me/runs/mine")


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B-Instruct", "./a b/ümläut", "/", "...", "x" * 300, "模型/千问"])
def test_the_name_made_from_any_model_may_name_a_folder_and_a_job(model: str) -> None:
    loaded = load_run(["--model", model, "--dataset", "a"])
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", make_plan(loaded.run, profile("local")).name)


@pytest.mark.parametrize(
    ("line", "what", "choices"),
    [
        ("--nproc_per_node 9", "a node of infiniband-h100 has 8 GPUs", ("1 … 8",)),
        ("--nodes 17", "gpu gives at most 16 nodes to a job", ("1 … 16",)),
        ("--nodes 65 --partition scavenge", "scavenge gives at most 64 nodes to a job", ("1 … 64",)),
        ("--partition gpuu", "infiniband-h100 has no such partition", ("cpu", "gpu", "scavenge")),
        ("--time 3-00:00:00", "gpu allows at most 2-00:00:00", ()),
        ("--time 6", "shorter than the warning of 300 s", ()),
        ("--strategy ddpp", "no such value", (*STRATEGIES, "auto")),
        ("--task ppo", "not in this release", tuple(OBJECTIVES)),
        ("--task dpo --center_rewards_coefficient 0.1", "task: dpo has no such thing", ()),
        ("--task rm --beta 0.2", "task: rm has no such thing", ()),
        ("--task rm --truncation_strategy truncate_right", "scores the end of a text", ("drop", "truncate_left")),
        ("--truncation_strategy split", "task: sft does not split", ("drop", "truncate_left", "truncate_right")),
        (
            "--task dpo --truncation_strategy split",
            "task: dpo does not split",
            ("drop", "truncate_left", "truncate_right"),
        ),
        ("--task rm --truncation_strategy split", "task: rm does not split", ("drop", "truncate_left")),
        ("--task rm --modules_to_save lm_head", "a score in the place of lm_head", ()),
        ("--task rm --target_modules q_proj lm_head", "a score in the place of lm_head", ()),
        ("--beta 0.2", "task: sft has no such thing", ()),
        ("--num_labels 3", "task: sft has no classes", ()),
        ("--task rm --num_labels 3", "task: rm has no classes", ()),
        ("--task seq_cls --modules_to_save lm_head", "a score in the place of lm_head", ()),
        ("--task seq_cls --beta 0.1", "task: seq_cls has no such thing", ()),
        ("--task dpo --simpo_gamma 2", "task: dpo has no such thing", ()),
        ("--task cpo --loss_type ipo", "task: cpo has no such loss", ("sigmoid", "hinge")),
        ("--task dpo --loss_type hinge --label_smoothing 0.1", "is not smoothed", ("0",)),
        ("--task kto --desirable_weight 0 --undesirable_weight 0", "both are 0", ()),
        ("--task dpo --tuner_type full --reference adapters_off", "has no adapters", ("auto", "precompute")),
        ("--task kto --init_weights pissa --reference adapters_off", "out of the weights", ("auto", "precompute")),
        ("--global_batch_size 12", "12 windows do not divide among 8 ranks", ("8", "16")),
        ("--interleave_prob 0.5 0.5", "2 weights for 1 dataset", ()),
        ("--output_dir '~you/runs'", "output_dir: another user's home", ()),
        ("--early_stopping_patience 2", "there is nothing to evaluate on", ()),
        ("--load_best_model_at_end", "there is nothing to evaluate on", ()),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_queue(line: str, what: str, choices: tuple[str, ...]) -> None:
    (problem,) = plan_complaints(line)
    assert what in problem.what
    assert problem.choices == choices
    assert problem.where == "command line"
    assert problem.value


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--task dpp", "did you mean dpo?"),
        ("--task DPO", "did you mean dpo?"),
        ("--task dpo --loss_type ipo --label_smoothing 0.1", "or loss_type: sigmoid or robust or sigmoid_norm"),
        ("--task cpo --loss_type hinge --label_smoothing 0.1", "or loss_type: sigmoid"),
    ],
)
def test_what_a_refusal_proposes_is_what_the_run_may_have(line: str, hint: str) -> None:
    assert plan_complaints(line)[0].hint == hint


def test_every_problem_between_a_run_and_a_cluster_is_reported_at_once() -> None:
    found = plan_complaints("--nproc_per_node 9 --nodes 99 --partition x --tp 2 --task ppo --early_stopping_patience 1")
    assert len(found) == 6


def test_a_complaint_about_what_nobody_said_does_not_claim_a_place() -> None:
    hurried = profile("infiniband-h100").model_copy(update={"time": 99_999})
    with pytest.raises(Refusal) as caught:
        make_plan(run().run, hurried, run().origins)
    assert caught.value.problems[0].where == ""


def test_code_of_the_hub_runs_only_at_a_pinned_revision() -> None:
    words = ["--model", "own/er", "--dataset", "a", "--trust_remote_code"]
    with pytest.raises(Refusal, match="revision must be pinned"):
        make_plan(load_run(words).run, profile("local"))
    assert make_plan(load_run([*words, "--revision", "abc123"]).run, profile("local")).model.trust_remote_code


def test_this_machine_is_one_node_and_is_never_preempted() -> None:
    (problem,) = plan_complaints("--nodes 2", "local")
    assert "--cluster" in problem.hint
    assert plan(cluster="local").resources.preemption == "none"


@pytest.mark.parametrize("cluster", PROFILES)
@pytest.mark.parametrize("name", STARTERS)
def test_the_plan_is_whole_on_every_profile(name: str, cluster: str) -> None:
    line = f"{starter(name)} --nodes 1 --nproc_per_node 1 --time 20"
    made = from_words(line, cluster)
    assert made.layout.nodes == made.resources.nodes
    assert made.layout.ranks_per_node == made.resources.tasks_per_node
    assert made.resources.cpus_per_task * made.resources.tasks_per_node <= profile(cluster).cores_per_node
    assert Plan.from_json(made.to_json()) == made


def test_origins_are_for_complaints_only_and_never_change_the_plan() -> None:
    loaded = run("--seed 5")
    elsewhere = dict.fromkeys(loaded.origins, "other.yaml:9")
    assert make_plan(loaded.run, profile("local"), elsewhere) == make_plan(loaded.run, profile("local"), loaded.origins)


@pytest.mark.parametrize(("ranks", "memory"), [("8", "0"), ("2", None)])
def test_all_memory_of_a_node_is_asked_for_only_with_all_of_its_gpus(ranks: str, memory: str | None) -> None:
    line = f"--model a/b --dataset x.jsonl --nproc_per_node {ranks}"
    assert from_words(line, "infiniband-h100").resources.memory == memory


def test_a_part_of_a_node_s_memory_that_is_named_is_asked_for() -> None:
    line = "--model a/b --dataset x.jsonl --nproc_per_node 2 --mem 200G"
    assert from_words(line, "infiniband-h100").resources.memory == "200G"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"beta": 0.0, "loss_type": "none", "reference": "none"}),
        ("--task dpo", {"beta": 0.1, "loss_type": "sigmoid", "rpo_alpha": 0.0, "reference": "adapters_off"}),
        ("--task dpo --tuner_type full", {"reference": "precompute"}),
        ("--rlhf_type dpo --init_weights pissa", {"reference": "precompute"}),
        ("--stage kto --lora_bias all", {"reference": "precompute", "loss_type": "none", "desirable_weight": 1.0}),
        (
            "--task dpo --pref_beta 0.3 --pref_ftx 1 --pref_loss ipo",
            {"beta": 0.3, "rpo_alpha": 1.0, "loss_type": "ipo"},
        ),
        ("--task simpo", {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "reference": "none"}),
        ("--task cpo", {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.0}),
        ("--task orpo --rl_beta 0.2", {"beta": 0.2, "cpo_alpha": 0.0}),
        ("--task rm", {"beta": 0.0, "center_rewards_coefficient": 0.0, "reference": "none"}),
        ("--rlhf_type rm --center_rewards_coefficient 0.01", {"center_rewards_coefficient": 0.01}),
        ("--stage rm", {"loss_type": "none"}),
    ],
)
def test_the_objective_s_settings_follow_from_the_task(line: str, expected: dict[str, Any]) -> None:
    objective = dataclasses.asdict(plan(line).objective)
    assert {leaf: objective[leaf] for leaf in expected} == expected


def test_pre_training_trains_every_token_with_the_loss_of_fine_tuning() -> None:
    made = plan("--task pt")
    assert (made.train.objective, made.data.train_on, made.data.rows) == ("pretrain", "all", "chat")
    assert made.train.objective_module == OBJECTIVES["sft"].module


def test_classification_asks_for_labels_and_cuts_a_text_at_either_end() -> None:
    made = plan("--task_type seq_cls --num_labels 3 --truncation_strategy right")
    assert (made.data.rows, made.data.num_labels, made.objective.labels) == ("labelled", 3, ())
    assert (made.scored, made.labelled, made.number, made.data.truncation) == (True, True, "score", "truncate_right")
    assert plan("--task seq_cls").data.num_labels == 0
    assert [plan(line).number for line in ("--task rm", "--task sft")] == ["reward", "logit"]
    assert made.with_labels(["a", "b"]).objective.labels == ("a", "b")
    assert Plan.from_json(made.with_labels(["a"]).to_json()).objective.labels == ("a",)


def test_rows_are_those_that_the_objective_needs() -> None:
    assert [plan(f"--task {task}").data.rows for task in ("dpo", "kto", "orpo", "rm")] == [
        "pair",
        "rated",
        "pair",
        "pair",
    ]


def test_a_profile_may_have_data_prepared_by_a_job_of_its_own() -> None:
    made = from_words("--model m --dataset a.jsonl", "infiniband-h100").resources
    assert made.prepare == "job"
    assert made.prepare_job is not None
    assert (made.prepare_job.partition, made.prepare_job.cores, made.prepare_job.time_minutes) == ("cpu", 32, 360)
    assert from_words("--model m --dataset a.jsonl", "cloud-spot").resources.prepare_job is None
    loaded = load_run(["--model", "m", "--dataset", "a.jsonl"])
    bare = profile("infiniband-h100").model_copy(update={"prepare_job": None})
    job = make_plan(loaded.run, bare, loaded.origins).resources.prepare_job
    assert job is not None
    assert job.partition == "gpu", "the run's own, where the profile names none"


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"prepare": "login"}, "prepare_job says what a job asks for, but prepare is login", "prepare: job"),
        ({"prepare_job": PrepareJob(partition="cpus")}, "infiniband-h100 has no such partition", "did you mean cpu?"),
        ({"prepare_job": PrepareJob(partition="cpu", time=9000)}, "cpu allows at most 1-00:00:00", "goes on where"),
    ],
)
def test_a_job_for_data_that_the_profile_cannot_give_is_refused(changes: dict[str, Any], what: str, hint: str) -> None:
    loaded = load_run(["--model", "m", "--dataset", "a.jsonl"])
    with pytest.raises(Refusal) as refused:
        make_plan(loaded.run, profile("infiniband-h100").model_copy(update=changes), loaded.origins)
    (problem,) = refused.value.problems
    assert what in problem.what
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("line", "policy"),
    [
        ("", "drop"), ("--task pretrain", "split"), ("--task pt --truncation_strategy delete", "drop"),
        ("--task pretrain --truncation_strategy right", "truncate_right"), ("--task dpo", "drop"),
        ("--task pretrain --truncation_strategy split", "split"),
    ],
)  # fmt: skip
def test_long_texts_are_split_where_every_token_is_trained_unless_it_is_said_otherwise(line: str, policy: str) -> None:
    assert plan(line).data.truncation == policy
