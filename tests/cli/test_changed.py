"""A run submitted again with other keys is refused in the words of its file, before anything is prepared."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from hpcft.cli.changed import LEAVES, refuse_changed
from hpcft.cli.common import plan_run
from hpcft.config.leaves import leaf_sections
from hpcft.errors import Problem, Refusal
from hpcft.plan.difference import value
from hpcft.plan.plan import Plan
from hpcft.run.folder import keep_plan, make_folder
from hpcft.run.ledger import JOB_VARIABLE, Ledger
from hpcft.run.paths import RunPaths
from tests.cli.test_commands import refused
from tests.words import write

LINE = "run.yaml --cluster local"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with run.yaml and the run that was made of it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "name: mine\nmodel: own/er\ndataset: own/data\nmax_steps: 4\nseed: 1\n")
    keep(plan_run(shlex.split(LINE)).plan)
    return tmp_path


def keep(plan: Plan) -> None:
    paths = RunPaths(Path("runs/mine").absolute())
    make_folder(paths.root)
    keep_plan(plan.to_json(), paths)


def problems(line: str) -> list[Problem]:
    with pytest.raises(Refusal) as caught:
        refuse_changed(plan_run(shlex.split(f"{LINE} {line}")))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--max_steps 6", "max_steps: 4 in run mine, 6 here"),
        ("--lr 1e-3", "learning_rate: 0.0001 in run mine, 0.001 here"),
        ("--seed 2", "seed: 1 in run mine, 2 here"),
        ("--dataset 'own/data#5' b.jsonl", "dataset: own/data in run mine, own/data#5 b.jsonl here"),
        ("--model other/one", "model: own/er in run mine, other/one here"),
        ("--lora_rank 16", "lora_rank: 8 in run mine, 16 here"),
        ("--val_dataset b.jsonl --eval_steps -1", "val_dataset: none in run mine, b.jsonl here"),
    ],
)
def test_a_changed_key_is_named_with_both_values_and_its_place(there: Path, line: str, what: str) -> None:
    (problem,) = problems(line)
    assert (problem.what, problem.where) == (what, "command line")
    assert "hpcft resume mine" in problem.hint


def test_it_is_said_by_submit_before_anything_else(there: Path) -> None:
    assert "max_steps: 4 in run mine, 6 here" in refused(f"submit {LINE} --max_steps 6", there)
    assert not (there / "prepared").exists()


def test_a_finished_run_is_not_offered_to_be_resumed(there: Path) -> None:
    Ledger(RunPaths(Path("runs/mine").absolute()), "batch", {JOB_VARIABLE: "1"}).write("finished", step=4)
    (problem,) = problems("--max_steps 6")
    assert problem.hint == "--name NAME makes it a run of its own"


def test_a_key_that_was_taken_out_of_the_file_is_said_of_the_file(there: Path) -> None:
    write(there, "name: mine\nmodel: own/er\ndataset: own/data\nseed: 1\n")
    (problem,) = problems("")
    assert (problem.what, problem.where) == ("max_steps: 4 in run mine, -1 here", "run.yaml")


def test_what_only_the_hub_can_tell_and_how_it_is_spread_may_differ(there: Path) -> None:
    plan = plan_run(shlex.split(LINE)).plan
    source = dataclasses.replace(plan.data.train[0], revision="abc")
    data = dataclasses.replace(plan.data, train=(source,), tokenizer_revision="abc")
    keep(dataclasses.replace(plan, model=dataclasses.replace(plan.model, revision="abc"), data=data))
    refuse_changed(plan_run(shlex.split(f"{LINE} --nproc_per_node 1 --time 20")))


@pytest.mark.parametrize(("key", "leaf"), LEAVES.items())
def test_a_key_of_the_plan_is_said_by_a_key_of_a_run(there: Path, key: str, leaf: str) -> None:
    whole: dict[str, Any] = dataclasses.asdict(plan_run(shlex.split(LINE)).plan)
    value(whole, key)
    assert leaf in leaf_sections()
