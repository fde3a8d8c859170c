"""Cluster profiles: where one is found, and what is wrong in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcft.config.load import cluster_names, load_cluster
from hpcft.errors import Problem, Refusal
from tests.words import PROFILES, profile, write

LEAST = "name: mine\ncores_per_node: 8\n"


def wrong(*arguments: object) -> tuple[Problem, ...]:
    """Every complaint about a profile."""
    with pytest.raises(Refusal) as caught:
        load_cluster(*arguments)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_that_comes_along_loads_and_is_called_as_its_file(name: str) -> None:
    assert profile(name).name == name
    assert name in cluster_names()


def test_without_a_name_the_profile_is_cluster_yaml_here_then_beside_the_run_then_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    assert load_cluster(None, there / "run.yaml")[0].name == "local"
    write(there, LEAST, "cluster.yaml")
    assert load_cluster(None, there / "run.yaml")[0].name == "mine"
    write(here, LEAST.replace("mine", "nearer"), "cluster.yaml")
    assert load_cluster(None, there / "run.yaml")[0].name == "nearer"


def test_a_name_is_found_in_clusters_here_or_beside_the_run_before_those_that_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters").mkdir()
    write(tmp_path / "clusters", LEAST, "local.yaml")
    assert load_cluster("local", tmp_path / "run.yaml")[0].name == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_cluster("local")[0].name == "mine"


def test_a_path_in_a_run_file_may_be_meant_from_that_file(tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    write(tmp_path / "my", LEAST, "site.yaml")
    assert load_cluster("my/site.yaml", tmp_path / "run.yaml")[0].name == "mine"


def test_a_name_that_nobody_knows_is_refused_with_those_that_are_known_and_where_it_was_said() -> None:
    (problem,) = wrong("infiniband-h10", None, "run.yaml:3")
    assert problem.where == "run.yaml:3"
    assert set(PROFILES) <= set(problem.choices)
    assert problem.hint == "did you mean infiniband-h100?"


@pytest.mark.parametrize("name", ["a" * 5000, "../" * 2000 + "x.yaml", "x\x00.yaml"])
def test_a_name_that_no_file_could_have_is_refused(name: str) -> None:
    assert wrong(name)


def test_every_problem_of_a_profile_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = (
        "name: two words\ncores_per_node: many\ngpu_reqest: gres\nfabric: string\n"
        "partitions:\n  gpu: {max_time: soon, max_nods: 3}\nsetup: ['a\\nb']\nextra: [-p gpu]\n"
        'extra2: 1\nenvironment: {"A B": c}\ngpus_per_node: true\n'
    )
    file = write(tmp_path, text, "cluster.yaml")
    problems = wrong(file)
    lines = [int(problem.where.rpartition(":")[2]) for problem in problems]
    assert lines == sorted(lines)
    assert set(lines) == {1, 2, 3, 4, 6, 8, 9, 10, 11}
    assert any("did you mean gpu_request?" in problem.hint for problem in problems)


def test_a_default_partition_must_be_one_of_the_partitions(tmp_path: Path) -> None:
    file = write(tmp_path, LEAST + "partition: gpuu\npartitions: {gpu: {}}\n", "cluster.yaml")
    (problem,) = wrong(file)
    assert (problem.where, problem.choices) == (f"{file}:3", ("gpu",))


def test_a_profile_without_cores_is_refused_with_its_file(tmp_path: Path) -> None:
    file = write(tmp_path, "name: mine\n", "cluster.yaml")
    (problem,) = wrong(file)
    assert (problem.what, problem.where) == ("cores_per_node: missing", file)


def test_a_profile_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, LEAST, "cluster.yaml")
    Path(file).chmod(0)
    if os.access(file, os.R_OK):  # root reads everything
        Path(file).unlink()
    assert "cannot be read" in wrong(file)[0].what


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_names_a_home_or_holds_a_secret(name: str) -> None:
    text = (Path(__file__).parents[2] / "templates" / "clusters" / f"{name}.yaml").read_text()
    assert "/home/" not in text
    assert "token" not in text.lower()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("environment:\n  HF_HOME: /x\n  WANDB_API_KEY: s3cret0123", 5),
        ("environment: {HF_TOKEN: hf_s3cret0123}", 3),
        ("environment: {HF_TOKEN: '${HF_TOKEN:-hf_s3cret0123}'}", 3),
        ("environment: {AWS_SECRET_ACCESS_KEY: s3cret0123}", 3),
        ("environment: {mlflow_tracking_password: s3cret0123}", 3),
        ("environment: {HTTPS_PROXY: 'http://me:s3cret0123@proxy:3128'}", 3),
        ("setup: ['module load x', 'export HF_TOKEN=hf_s3cret0123']", 3),
        ("setup: ['export A=1 WANDB_API_KEY=\"s3cret 0123\"; true']", 3),
    ],
)
def test_a_secret_that_would_stand_in_the_script_is_refused_with_its_line_and_not_repeated(
    said: str, line: int, tmp_path: Path
) -> None:
    file = write(tmp_path, f"{LEAST}{said}\n", "cluster.yaml")
    (problem,) = wrong(file)
    assert problem.where == f"{file}:{line}"
    assert "export" in problem.hint
    assert "s3cret" not in str(Refusal([problem]).report)


def test_what_only_sounds_like_a_secret_or_stands_for_one_is_taken(tmp_path: Path) -> None:
    text = (
        "environment: {TOKENIZERS_PARALLELISM: 'false', HF_HUB_DISABLE_IMPLICIT_TOKEN: '1', HF_TOKEN: '${HF_TOKEN}',\n"
        "  WANDB_API_KEY: $MY_KEY, HF_TOKEN_PATH: /x/token, HTTPS_PROXY: 'http://proxy:3128', OTHER_TOKEN: '${A:-}'}\n"
        'setup:\n  - export HF_TOKEN="$(cat "$HOME/.hf-token")" WANDB_API_KEY=$(< ~/.wandb)\n'
        "  - source /x/env.sh; export SOME_TOKEN=$OTHER\n"
    )
    assert load_cluster(write(tmp_path, LEAST + text, "cluster.yaml"))[0].environment["WANDB_API_KEY"] == "$MY_KEY"
