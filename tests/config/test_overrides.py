"""The command line: every spelling that people bring, and what is wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcft.config.load import load_run
from tests.words import LEAST, complaints, run, write


@pytest.mark.parametrize(
    "line",
    [
        "--learning_rate 3e-4",
        "--learning_rate=3e-4",
        "--learning-rate 3e-4",
        "--learning-rate=3e-4",
        "--train.learning_rate 3e-4",
        "--train.learning_rate=3e-4",
        "learning_rate=3e-4",
        "learning-rate=3e-4",
        "train.learning_rate=3e-4",
        "lr=0.0003",
    ],
)
def test_a_key_is_understood_in_every_spelling(line: str) -> None:
    loaded = run(line)
    assert loaded.run.train.learning_rate == 3e-4
    assert loaded.origins["learning_rate"] == "command line"


@pytest.mark.parametrize(
    "line",
    [
        "--target_modules q_proj v_proj",
        "--target_modules q_proj,v_proj",
        "--target_modules=q_proj,v_proj",
        "--target_modules q_proj, v_proj",
        "target_modules=q_proj,v_proj",
        """--target_modules '["q_proj", "v_proj"]'""",
        """target_modules='["q_proj", "v_proj"]'""",
        "--tuner.target_modules q_proj v_proj --seed 1",
        "--target_modules q_proj v_proj seed=1",
    ],
)
def test_a_list_is_understood_in_every_spelling(line: str) -> None:
    assert run(line).run.tuner.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--deterministic", True),
        ("--deterministic true", True),
        ("--deterministic=True", True),
        ("--deterministic yes", True),
        ("--deterministic 1", True),
        ("deterministic=on", True),
        ("--deterministic false", False),
        ("--deterministic no", False),
        ("--deterministic 0", False),
        ("--deterministic --seed 1", True),
    ],
)
def test_a_switch_is_understood_in_every_spelling(line: str, expected: bool) -> None:
    assert run(line).run.train.deterministic is expected


def test_the_command_line_wins_over_the_file_in_any_order(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\ndataset: a\nseed: 1\n")
    for words in ([file, "--seed", "2"], ["--seed", "2", file], ["seed=2", file], [file, "seed=2"]):
        assert load_run(words).run.train.seed == 2


@pytest.mark.parametrize(
    "words", [["--dataset", "b", "c", "FILE"], ["--deterministic", "FILE"], ["--config", "FILE"], ["--config=FILE"]]
)
def test_the_run_file_is_found_behind_a_list_a_switch_and_config(tmp_path: Path, words: list[str]) -> None:
    file = write(tmp_path, "model: m\ndataset: a\nseed: 1\n")
    loaded = load_run([word.replace("FILE", file) for word in words])
    assert str(loaded.file) == file
    assert loaded.run.train.seed == 1


def test_a_cluster_profile_is_no_run_file() -> None:
    loaded = run("--cluster my.yaml")
    assert (loaded.run.cluster, loaded.file) == ("my.yaml", None)


@pytest.mark.parametrize(
    ("line", "leaf", "expected"),
    [
        ("--system 'a=b'", "data", "a=b"),
        ("--system=a=b", "data", "a=b"),
        ("--system 'You are, in all, kind.'", "data", "You are, in all, kind."),
        ("--system ''", "data", ""),
        ("--system '-5'", "data", "-5"),
        ("--system 'Grüße, 世界 {{NAME}} {% x %}'", "data", "Grüße, 世界 {{NAME}} {% x %}"),
        ("--system 'two\nlines'", "data", "two\nlines"),
    ],
)
def test_a_text_value_is_taken_as_it_is(line: str, leaf: str, expected: str) -> None:
    assert getattr(run(line).run, leaf).system == expected


def test_a_negative_number_is_a_value() -> None:
    assert run("--max_steps -1 --eval_steps -1").run.train.eval_steps == -1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--seed", "seed: needs a value"),
        ("--learning_rate --seed 1", "learning_rate: needs a value"),
        ("--nodes", "nodes: needs a value"),
        ("--model", "model: given twice"),
        ("--seed 1 --seed 2", "seed: given twice"),
        ("--seed 1 --train.seed 2", "train.seed: given twice"),
        ("--lr 1 --learning_rate 2", "learning_rate: contradicts lr: 1 at command line"),
        ("--zzz 1", "zzz: no such key"),
        ("zzz=1", "zzz: no such key"),
        ("-x", "-x: no such option"),
        ("=5", "=5: no key stands before the ="),
        ("--seed 1 =5", "=5: no key stands before the ="),
        ("--seed 1 loose", "loose: belongs to no key"),
        ("--seed 1 2", "2: belongs to no key"),
        ("--config", ".: cannot be read"),
        ("--resume", ""),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(line: str, what: str) -> None:
    words = [*LEAST.split(), *line.split()]
    if not what:
        assert load_run(words).run.checkpoint.resume_from_checkpoint == "auto"
        return
    assert any(what in f"{problem.where}: {problem.what}" for problem in complaints(*words))


def test_a_list_given_twice_is_told_how_to_give_several_values() -> None:
    problem = complaints("--model", "m", "--dataset", "a", "--dataset", "b")[0]
    assert problem.hint == "several values go behind one --dataset"


def test_two_run_files_are_refused_with_the_way_to_have_both(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\ndataset: a\n")
    (problem,) = complaints(file, file)
    assert "extends" in problem.hint


def test_every_problem_of_a_command_line_is_reported_at_once() -> None:
    found = complaints("--modl", "x", "--seed", "-1", "--zzz", "1", "loose", "-y")
    assert len(found) == 6  # five words, and the data that is missing; the model is only misspelt


@pytest.mark.parametrize(("text", "expected"), [("{}", True), ("[[", False)])
def test_json_that_is_none_is_taken_as_words(text: str, expected: Any) -> None:
    words = ["--model", "m", "--dataset", text]
    if expected:
        assert "a dataset needs a path" in complaints(*words)[0].what
    else:
        assert load_run(words).run.data.dataset == ("[[",)
