"""A run that is cancelled stays cancelled, whenever it was."""

from __future__ import annotations

import random
import time

import pytest

from hpcft.run.manifest import newest_verified
from hpcft.slurm.states import State
from tests.endtoend.scene import Scene

GONE = (State.CANCELLED, State.COMPLETED, State.FAILED, State.FORGOTTEN)


@pytest.mark.slow
def test_scancel_at_any_moment_ends_the_job_for_good(scene: Scene, thorough: bool) -> None:
    moments = random.Random(20261121)
    seen: dict[str, int] = {}
    for number in range(24 if thorough else 4):
        name = f"cancelled-{number}"
        job = scene.submit(name, nodes=1, max_steps=100_000, save_steps=5, partition="low")
        time.sleep(moments.uniform(0, 20))
        phase = "training" if scene.losses(name) else "start"
        seen[phase] = seen.get(phase, 0) + 1
        scene.slurm.run(["scancel", job])
        scene.wait_for_job(job, GONE, 60, name)
        time.sleep(7)  # a requeued job would be back by now
        assert scene.slurm.state(job) in GONE, scene.words_of(name)
        assert not any(event["event"] == "requeued" for event in scene.events(name))
        if any(event["event"] == "saved" for event in scene.events(name)):
            assert newest_verified(scene.paths(name)) is not None
    print(f"cancelled while: {seen}")


def test_hpcft_cancel_ends_a_run_and_resume_brings_it_back(scene: Scene) -> None:
    scene.submit("again", nodes=1, max_steps=400, save_steps=10)
    scene.wait_for_step("again", 10)
    scene.hpcft("cancel", "again")
    assert scene.wait_for_end("again") == "cancelled"
    scene.hpcft("resume", "again")
    scene.wait_for_attempt("again", 2)
    assert scene.wait_for_end("again") == "finished"
    assert sorted(set(scene.losses("again"))) == list(range(1, 401))
