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
@pytest.mark.parametrize("group", range(4))
def test_scancel_at_any_moment_ends_the_job_for_good(scene: Scene, group: int, thorough: bool) -> None:
    """One random moment in each group, six in each with `make campaign`: two dozen in all."""
    moments = random.Random(20261121 + group)
    for number in range(6 if thorough else 1):
        name = f"cancelled-{group}-{number}"
        job = scene.submit(name, nodes=1, max_steps=100_000, save_steps=5, partition="low")
        if (group + number) % 2:  # half of them while it trains and saves, half while it starts
            scene.wait_for_step(name, 1)
            time.sleep(moments.uniform(0, 4))
        else:
            time.sleep(moments.uniform(0, 12))
        step = scene.step(name)
        scene.slurm.run(["scancel", job])
        scene.wait_for_job(job, GONE, 180, name)
        time.sleep(7)  # a requeued job would be back by now
        assert scene.slurm.state(job) in GONE, scene.words_of(name)
        assert not any(event["event"] == "requeued" for event in scene.events(name))
        if any(event["event"] == "saved" for event in scene.events(name)):
            assert newest_verified(scene.paths(name)) is not None
        print(f"job {job} cancelled {f'after step {step}' if step else 'while it started'}")


def test_hpcft_cancel_ends_a_run_and_resume_brings_it_back(scene: Scene) -> None:
    scene.submit("again", nodes=1, max_steps=400, save_steps=10)
    scene.wait_for_step("again", 10)
    scene.hpcft("cancel", "again")
    assert scene.wait_for_end("again") == "cancelled"
    scene.hpcft("resume", "again")
    scene.wait_for_attempt("again", 2)
    assert scene.wait_for_end("again") == "finished"
    assert sorted(set(scene.losses("again"))) == list(range(1, 401))
