"""What a run reads, looked at before anything is prepared or queued: each leaf with its line, all at once."""

from __future__ import annotations

import json
from pathlib import Path

from hpcft.launch.inputs import missing_inputs, unwritable_store
from hpcft.plan.plan import Source
from tests.plans import plan

LINES = {"model": "run.yaml:2", "dataset": "run.yaml:4", "val_dataset": "run.yaml:5"}


def test_everything_that_is_missing_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").touch()
    data = {"train": (Source(path=str(tmp_path / "chat.jsonl")),), "validation": (Source(path="/none/v.jsonl"),)}
    found = missing_inputs(plan(model={"path": str(tmp_path / "model")}, data=data), LINES, weights=True)
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
    assert missing_inputs(chosen, LINES, weights=False) == []
    [problem] = missing_inputs(chosen, LINES, weights=True)
    assert (problem.where, problem.what.partition(":")[2][:21]) == ("run.yaml:2", " no weights are there")


def test_a_hubs_names_are_not_looked_for_here() -> None:
    hub = plan(
        model={"path": "own/er", "source": "huggingface"}, data={"train": (Source(path="a/b", source="huggingface"),)}
    )
    assert missing_inputs(hub, LINES, weights=True) == []


def test_a_store_that_can_be_made_is_no_problem(tmp_path: Path) -> None:
    assert unwritable_store(tmp_path / "not/yet/there") is None
    assert unwritable_store(tmp_path) is None
