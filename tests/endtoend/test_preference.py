"""Preferences are learned on a real Slurm: each objective from real records, and DPO although it is preempted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpcft.catalog import OBJECTIVES
from tests.endtoend.scene import Scene, real_records
from tests.loopback import LoopbackSlurm

PAIRS, RATED = "dpo_en_demo.json", "kto_en_demo.json"
STEPS = 20
REWARDS = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"}
SHOWN = {*REWARDS, "logps/chosen", "logps/rejected"}
# What a task says of every step; of pairs also how often the chosen answer is ahead.
METRICS = {"kto": {*SHOWN, "kl"}, "rm": {*REWARDS, "rewards/accuracies"}, "seq_cls": {"loss", "grad_norm", "accuracy"}}

# Of dpo with adapters the other test makes two runs.
RUNS: dict[str, dict[str, Any]] = {
    "kto": {"tuner_type": "full", "global_batch_size": 8},
    "orpo": {"tuner_type": "lora"},
    "cpo": {"tuner_type": "full", "strategy": "fsdp"},
    "simpo": {"tuner_type": "lora", "nproc_per_node": 2},
    "rm": {"tuner_type": "lora"},
    "seq_cls": {"tuner_type": "full", "global_batch_size": 8},
}


@pytest.fixture(scope="module")
def preferences(slurm: LoopbackSlurm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Real pairs and rated answers, and a tokenizer trained on both."""
    place = Scene(tmp_path_factory.mktemp("preferences"), slurm)
    files = [Path(real(name).partition("#")[0]) for name in (PAIRS, RATED)]
    place.model([line for file in files for line in file.read_text("utf-8").splitlines()])
    place.keys |= {"max_length": 1024, "truncation_strategy": "drop", "nproc_per_node": 1, "eval_steps": -1}
    place.keys |= {"global_batch_size": 4}
    return place


def real(name: str) -> str:
    """Rows of a real file; the test is skipped where it is not."""
    sources = real_records(name, rows=100)
    if sources is None:
        pytest.skip(f"no real records: set HPCFT_REAL_DATA to a folder with {name}")
    return sources[0]


def lines(scene: Scene, name: str, task: str) -> list[dict[str, Any]]:
    """The lines of a run's steps, each with every metric of its objective, all of them finite."""
    found = [line for line in scene.metrics(name) if "loss" in line]
    for line in found:
        for metric in METRICS.get(task, {*SHOWN, "rewards/accuracies"}):
            assert math.isfinite(line[metric]), (metric, line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task in ("kto", "rm") else pytest.mark.campaign) for task in RUNS]
)
def test_every_objective_trains_on_real_records(preferences: Scene, task: str) -> None:
    records = real(PAIRS if OBJECTIVES[task].rows == "pair" else RATED)
    preferences.submit(task, task=task, dataset=records, max_steps=3, **RUNS[task])
    assert preferences.wait_for_end(task) == "finished"
    taken = lines(preferences, task, task)
    assert [line["step"] for line in taken] == [1, 2, 3]
    assert taken[0]["loss"] != taken[2]["loss"]
    if task == "kto":  # the policy is its reference
        assert taken[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    if task in ("rm", "seq_cls"):  # a new score knows nothing of two answers, or of two classes
        assert taken[0]["loss"] == pytest.approx(math.log(2), rel=0.1)


@pytest.mark.slow
def test_a_preemption_leaves_the_curves_of_dpo_as_they_are_to_the_last_bit(preferences: Scene) -> None:
    keys = {"task": "dpo", "dataset": real(PAIRS), "tuner_type": "lora", "nproc_per_node": 2, "max_steps": STEPS}
    preferences.submit("calm", **keys)
    assert preferences.wait_for_end("calm") == "finished"
    calm = lines(preferences, "calm", "dpo")
    assert calm[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert len({line["loss"] for line in calm}) == len(calm) == STEPS

    preferences.submit("taken", partition="low", **keys)
    preferences.wait_for_step("taken", 2)
    preferences.preempt()
    assert preferences.wait_for_end("taken") == "finished"
    assert [event["event"] for event in preferences.events("taken")].count("requeued") == 1
    for one, other in zip(calm, lines(preferences, "taken", "dpo"), strict=True):
        assert {metric: one[metric] for metric in SHOWN} == {metric: other[metric] for metric in SHOWN}
