"""A run that is preempted comes back and takes exactly the steps that it would have taken."""

from __future__ import annotations

from typing import Any

import pytest

from tests.endtoend.scene import Scene

STEPS = 150
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner_type": "full"},
    "lora": {"tuner_type": "lora", "modules_to_save": ["lm_head", "embed_tokens"]},
}


def preempt(scene: Scene, name: str, times: int) -> None:
    """Take the nodes away so many times, each time after the run has gone on for a while."""
    for time in range(1, times + 1):
        scene.wait_for_step(name, scene.step(name) + STEPS // 6)
        scene.preempt()
        scene.wait_for_attempt(name, time + 1)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
def test_preemptions_leave_the_loss_curve_as_it_is_to_the_last_bit(
    real_scene: Scene, tuner: str, thorough: bool
) -> None:
    """Three preemptions, with grace and without; `make test` has the time for one, with grace for full tuning."""
    scene, keys = real_scene, {**TUNERS[tuner], "max_steps": STEPS, "eval_steps": STEPS // 4}
    scene.submit(f"calm-{tuner}", partition="batch", **keys)
    assert scene.wait_for_end(f"calm-{tuner}") == "finished"
    calm = scene.losses(f"calm-{tuner}")
    assert len(calm) == STEPS
    assert len(set(calm.values())) == STEPS, "two steps with one loss: a step left out could go unseen"
    evaluations = [row["eval_loss"] for row in scene.metrics(f"calm-{tuner}") if "eval_loss" in row]
    assert evaluations[-1] < evaluations[0]

    partitions = ["low", "low0"] if thorough else [{"full": "low", "lora": "low0"}[tuner]]
    for partition in partitions:
        name = f"{partition}-{tuner}"
        scene.submit(name, partition=partition, **keys)
        times = 3 if thorough else 1
        preempt(scene, name, times)
        assert scene.wait_for_end(name) == "finished"
        taken = [row["step"] for row in scene.metrics(name) if "loss" in row]
        assert scene.losses(name) == calm
        assert sum(event["event"] == "requeued" for event in scene.events(name)) >= (times if partition == "low" else 0)
        if partition == "low":  # with grace nothing is done twice
            assert sorted(taken) == list(range(1, STEPS + 1))
        assert scene.attempts(name)[-1].restart >= times


@pytest.mark.slow
def test_a_time_limit_is_survived_without_losing_a_step(scene: Scene) -> None:
    """The warning comes 90 s and up to a minute more before the limit of three minutes: the run is too long for it."""
    scene.submit("limit", partition="batch", time=3, max_steps=100_000, nodes=1, nproc_per_node=2, logging_steps=10)
    scene.wait_for_attempt("limit", 2, 480)
    first = scene.attempts("limit")[0]
    assert first.ending == "time_limit"
    scene.wait(lambda: scene.attempts("limit")[1].first_step is not None, 300, "its first step", "limit")
    second = scene.attempts("limit")[1]
    assert second.first_step == first.last_saved
    assert second.first_step
    scene.hpcft("cancel", "limit")
    assert scene.wait_for_end("limit") == "cancelled"
