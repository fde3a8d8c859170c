"""plan.json: what is written is read back; what is not a Plan of this release is refused with the way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.plan.plan import Plan, data_key
from tests.words import PROFILES, plan, profile


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(plan().to_json()), **changes})


@pytest.mark.parametrize("cluster", PROFILES)
def test_a_plan_is_read_back_as_it_was_and_written_as_the_same_bytes(cluster: str) -> None:
    made = plan("--system 'Grüße\n\"世界\"' --val_dataset b#5 --interleave_prob 1 --lora_alpha 16.5", cluster)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()
    assert again.fingerprint == made.fingerprint


def test_the_fingerprint_changes_with_every_decision() -> None:
    lines = ["", "--seed 1", "--lora_rank 9", "--nodes 2", "--time 2h", "--save_steps 9", "--name x", "--revision r"]
    assert len({plan(line).fingerprint for line in lines}) == len(lines)


def test_a_plan_of_another_schema_is_refused_with_the_command_that_renders_it_anew() -> None:
    for schema in (0, 4, "2", None):
        with pytest.raises(Refusal) as caught:
            Plan.from_json(changed(schema=schema), "runs/x/plan.json")
        (problem,) = caught.value.problems
        assert problem.where == "runs/x/plan.json"
        assert "hpcft render" in problem.hint
        assert problem.choices == ("1", "2", "3")


def test_an_unknown_key_and_a_missing_one_are_refused_by_name() -> None:
    with pytest.raises(Refusal, match="surplus"):
        Plan.from_json(changed(surplus=1))
    whole = json.loads(plan().to_json())
    for name in whole:
        with pytest.raises(Refusal):
            Plan.from_json(json.dumps({key: value for key, value in whole.items() if key != name}))
    for section in (name for name, value in whole.items() if isinstance(value, dict)):
        for leaf in whole[section]:
            torn = {**whole, section: {key: value for key, value in whole[section].items() if key != leaf}}
            with pytest.raises(Refusal):
                Plan.from_json(json.dumps(torn))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "42", '"x"', "\x00", "[" * 5000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5},
        {"layout": None},
        {"layout": []},
        {"layout": {"nodes": 2, "ranks_per_node": 8, "axes": [{"name": "dp", "degree": 3}]}},
        {"environment": [{"name": "A"}]},
        {"environment": "x"},
        {"environment": 5},
        {"batch": {"global_windows": "many"}},
        {"data": "x"},
    ],
)
def test_a_plan_with_a_value_of_the_wrong_kind_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        Plan.from_json(changed(**changes))


def test_true_is_no_number_in_a_plan() -> None:
    whole = json.loads(plan().to_json())
    whole["batch"]["micro_windows"] = True
    with pytest.raises(Refusal):
        Plan.from_json(json.dumps(whole))


def test_the_data_key_follows_what_shapes_the_shards_and_nothing_else() -> None:
    key = data_key(plan().data)
    same = [
        "--dataset_num_proc 4",
        "--nodes 2",
        "--lora_rank 9",
        "--lr 1",
        "--time 2h",
        "--per_device_train_batch_size 1",
    ]
    other = ["--seed 1", "--max_length 99", "--packing false", "--system x", "--val_dataset b", "--train_on all"]
    assert {data_key(plan(line).data) for line in same} == {key}
    assert len({key, *(data_key(plan(line).data) for line in other)}) == len(other) + 1


def test_the_plan_is_the_same_wherever_and_by_whomever_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan("--nodes 2").to_json()
    for name in ("HOME", "USER", "SCRATCH", "TMPDIR", "HF_HOME", "SLURM_JOB_ID", "RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.chdir(tmp_path)
    assert plan("--nodes 2").to_json() == before


@pytest.mark.parametrize("cluster", PROFILES)
def test_no_plan_holds_a_path_of_this_machine(cluster: str) -> None:
    text = plan(cluster=cluster).to_json()
    assert str(Path.home()) + "/" not in text
    assert str(Path.cwd()) not in text
    assert profile(cluster).name in text
