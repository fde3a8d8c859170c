"""What a run reads, looked at before anything is prepared or queued: each leaf with its line, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcft.errors import Problem, Refusal
from hpcft.launch import processes
from hpcft.launch.inputs import missing_inputs, unwritable_store
from hpcft.plan.plan import Plan, Source
from tests.plans import plan

LINES = {"model": "run.yaml:2", "dataset": "run.yaml:4", "val_dataset": "run.yaml:5"}


def test_everything_that_is_missing_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").touch()
    data = {"train": (Source(path=str(tmp_path / "chat.jsonl")),), "validation": (Source(path="/none/v.jsonl"),)}
    found = missing_inputs(plan(model={"path": str(tmp_path / "model")}, data=data), LINES, ranks=True)
    assert [(problem.where, problem.what) for problem in found] == [
        ("run.yaml:2", "model: no model is there"),
        ("run.yaml:4", "dataset: no such file"),
        ("run.yaml:5", "val_dataset: no such file"),
    ]
    assert found[1].hint == f"did you mean {tmp_path / 'chats.jsonl'}?"


def test_weights_are_looked_at_where_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "rows.jsonl").touch()
    chosen = plan(
        model={"path": str(tmp_path), "from_scratch": False},
        data={"train": (Source(path=str(tmp_path / "rows.jsonl")),)},
    )
    assert missing_inputs(chosen, LINES, ranks=False) == []
    [problem] = missing_inputs(chosen, LINES, ranks=True)
    assert (problem.where, problem.what.partition(":")[2][:21]) == ("run.yaml:2", " no weights are there")


def test_a_hubs_names_are_not_looked_for_here() -> None:
    hub = plan(
        model={"path": "own/er", "source": "huggingface"}, data={"train": (Source(path="a/b", source="huggingface"),)}
    )
    assert missing_inputs(hub, LINES, ranks=True) == []


def test_a_store_that_can_be_made_is_no_problem(tmp_path: Path) -> None:
    assert unwritable_store(tmp_path / "not/yet/there") is None
    assert unwritable_store(tmp_path) is None


def test_a_checkpoint_to_begin_with_that_is_none_is_said_where_the_run_has_none_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "rows.jsonl").touch()
    chosen = plan(
        model={"path": str(tmp_path / "model")},
        data={"train": (Source(path=str(tmp_path / "rows.jsonl")),)},
        checkpoint={"resume": str(tmp_path / "theirs")},
        folders={"runs": str(tmp_path)},
    )
    lines = {"resume_from_checkpoint": "run.yaml:7"}
    [problem] = missing_inputs(chosen, lines, ranks=True)
    assert (problem.where, problem.value) == ("run.yaml:7", str(tmp_path / "theirs"))
    assert problem.what.startswith("resume_from_checkpoint: no checkpoint is there")
    (tmp_path / chosen.name / "checkpoints/step-000004").mkdir(parents=True)
    assert missing_inputs(chosen, lines, ranks=True) == []


@pytest.mark.parametrize("prepared", [True, False])
def test_a_store_that_may_only_be_read_serves_where_the_data_is_prepared(
    prepared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ...]] = []

    def run_data(verb: str, plan: Plan, store: Path, *words: str, aside: bool) -> int:
        calls.append(words)
        return 0

    monkeypatch.setattr(processes, "unwritable_store", lambda store: Problem("may not be written"))
    monkeypatch.setattr(processes, "is_prepared", lambda plan, store: prepared)
    monkeypatch.setattr(processes, "run_data", run_data)
    pinned = plan(data={"tokenizer_revision": "abc"})
    if not prepared:
        with pytest.raises(Refusal, match="may not be written"):
            processes.run_prepare(plan(), pinned, tmp_path)
        return
    assert processes.run_prepare(plan(), pinned, tmp_path) == 0
    assert calls == [()]  # the other name is not to be remembered
