"""The page that `hpcft plan` prints: numbers with their arithmetic, and no nonsense for small ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hpcft.plan.explain import explain
from hpcft.plan.prepared import PreparedFacts
from tests.words import PROFILES, plan

FACTS = PreparedFacts("0" * 16, windows=1000, validation_windows=10, tokens=2_000_000, trained_tokens=500_000)


def test_the_batch_is_shown_as_it_multiplies_out() -> None:
    page = explain(plan("--nodes 2 --global_batch_size 64 --per_device_train_batch_size 2 --max_length 1024"), None, {})
    assert "2 nodes × 8 GPUs = 16 ranks; ddp: dp 16" in page
    assert "2 windows × 2 accumulation × 16 ranks = 64 windows" in page
    assert "× 1,024 tokens ≤ 65,536 tokens an optimizer step" in page


def test_steps_are_exact_once_the_data_is_prepared() -> None:
    page = explain(plan("--global_batch_size 64 --num_train_epochs 2.5 --warmup_ratio 0.1"), FACTS, {})
    assert "⌈1,000 windows / 64⌉ = 16 steps an epoch × 2.5 epochs = 40 optimizer steps" in page
    assert "⌈0.1 × 40⌉ = 4 steps" in page
    assert "1,000 windows, 2,000,000 tokens of which 25% are trained" in page


def test_before_that_the_page_says_so() -> None:
    page = explain(plan(), None, {})
    assert "not prepared yet" in page
    assert "the count of steps is known once the data is prepared" in page


def test_max_steps_wins_and_is_said() -> None:
    page = explain(plan("--max_steps 1 --warmup_steps 1"), FACTS, {})
    assert "max_steps: 1 optimizer step\n" in page
    assert "warm-up 1 step\n" in page


def test_the_page_warns_in_one_line_of_what_weights_without_masters_lose() -> None:
    warning = "WARNING: updates smaller than 1/256 of a weight are lost to rounding"
    page = explain(plan("--tuner_type full --main_params_dtype bfloat16"), None, {})
    assert "bfloat16 compute, bfloat16 weights and moments, no float32 masters" in page
    assert [line.strip().startswith(warning) for line in page.splitlines() if "WARNING" in line] == [True]
    assert "WARNING" not in explain(plan("--tuner_type full"), None, {})


@pytest.mark.parametrize("cluster", PROFILES)
def test_one_of_a_thing_is_not_spoken_of_in_the_plural(cluster: str) -> None:
    line = "--nodes 1 --nproc_per_node 1 --num_train_epochs 1 --save_steps 1 --val_dataset b --global_batch_size 1"
    page = explain(plan(f"{line} --time 20", cluster), dataclasses.replace(FACTS, windows=1), {})
    assert not re.findall(r"(?<![\d.,])1 (?:nodes|ranks|GPUs|windows|epochs|steps|cores|optimizer steps)\b", page)


def test_this_machine_is_not_spoken_of_as_if_it_were_slurm() -> None:
    page = explain(plan(cluster="local"), None, {})
    assert "requeue" not in page
    assert "preempt" not in page


def test_what_was_said_is_shown_with_its_origin_and_without_terminal_escapes() -> None:
    page = explain(plan(), None, {"system": ("\x1b[31mred\nline", "run.yaml:3")})
    assert "\x1b" not in page
    assert re.search(r"system +\\x1b\[31mred\\nline +run.yaml:3", page)


@pytest.mark.parametrize("cluster", PROFILES)
def test_every_variable_is_shown_with_its_reason(cluster: str) -> None:
    made = plan(cluster=cluster)
    page = explain(made, None, {})
    assert all(variable.reason in page for variable in made.environment)


def test_the_profiles_file_is_named() -> None:
    assert "infiniband-h100 (clusters/site.yaml)" in explain(plan(), None, {}, "clusters/site.yaml")


def test_the_objective_s_settings_are_shown_where_it_has_any() -> None:
    page = explain(plan("--task dpo --tuner_type full"), None, {})
    assert "objective   dpo: beta 0.1, loss_type sigmoid, label_smoothing 0, rpo_alpha 0\n" in page
    assert "reference: a pass over the data before the first step" in page
    assert "objective" not in explain(plan(), None, {})


def test_a_data_file_that_is_not_here_is_said_to_be_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan("--val_dataset lost.jsonl $HOME/b.jsonl owner/hub")
    assert "not on this machine: a.jsonl, lost.jsonl\n" in explain(made, None, {})
    Path("a.jsonl").write_text("{}\n")
    assert "not on this machine: lost.jsonl\n" in explain(made, None, {})
    assert "not on this machine" not in explain(made, FACTS, {}), "its shards are here"


def test_a_model_that_is_not_here_is_said_to_be_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "m, from local; there is none on this machine\n" in explain(plan(), None, {})
    Path("m").mkdir()
    assert "m, from local\n" in explain(plan(), None, {})
    made = plan()
    hub = dataclasses.replace(made.model, path="owner/hub", source="huggingface")
    assert "there is none" not in explain(dataclasses.replace(made, model=hub), None, {})


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.jsonl", f"{'x' * 400}.jsonl", "\0.jsonl"])
def test_a_name_that_no_file_can_have_is_one_that_is_not_here(name: str) -> None:
    made = plan()
    source = dataclasses.replace(made.data.train[0], path=name)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, train=(source,)))
    assert "not on this machine: " in explain(made, None, {})
