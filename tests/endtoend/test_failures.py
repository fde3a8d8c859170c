"""Dead ranks and lost nodes: the job step ends, says who it was, and the run goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.endtoend.scene import Scene


def process_of(scene: Scene, name: str, rank: int) -> int:
    """The process id of a rank of a run, found by its environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hpcft.train.main" not in words or b"srun" in words.split(b"\0")[0]:
            continue
        if f"HPCFT_RUN={scene.paths(name).root}".encode() in environ and f"SLURM_PROCID={rank}".encode() in environ:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank} of {name}")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_step_is_named_and_the_run_goes_on_in_the_same_allocation(scene: Scene) -> None:
    job = scene.submit("killed", max_steps=300, save_steps=20)
    scene.wait_for_save("killed", 40)
    os.kill(process_of(scene, "killed", 3), signal.SIGKILL)
    killed = time.monotonic()
    scene.wait(lambda: any(e["event"] == "attempt_ended" for e in scene.events("killed")), 70, "the end", "killed")
    assert time.monotonic() - killed < 60
    assert scene.wait_for_end("killed") == "finished"
    first, second = scene.attempts("killed")
    assert "rank 3" in first.why
    assert second.job == first.job == job
    assert (first.restart, second.restart) == (0, 0)
    assert second.first_step is not None
    assert second.first_step >= 40
    assert sorted(set(scene.losses("killed"))) == list(range(1, 301))


@pytest.mark.slow
def test_a_lost_node_leads_to_a_requeue_and_the_run_goes_on_elsewhere(scene: Scene) -> None:
    scene.submit("lost", max_steps=3000, save_steps=20)
    scene.wait_for_save("lost", 40)
    node = scene.attempts("lost")[0].nodes[1]
    scene.slurm.kill_node(node)
    try:
        scene.wait_for_attempt("lost", 2)
        scene.wait(lambda: scene.attempts("lost")[-1].first_step is not None, 300, "its steps", "lost")
        last = scene.attempts("lost")[-1]
        assert node not in last.nodes
        assert last.first_step is not None
        assert last.first_step >= 40
        assert last.restart >= 1
        scene.hpcft("cancel", "lost")
        assert scene.wait_for_end("lost") == "cancelled"
    finally:
        scene.slurm.start_node(node)


@pytest.mark.slow
def test_a_run_that_fails_at_the_same_place_again_and_again_stops_and_says_so(scene: Scene) -> None:
    scene.submit("hopeless", nodes=1, max_steps=50, learning_rate="1e30", max_grad_norm=0)
    assert scene.wait_for_end("hopeless") == "stopped"
    attempts = scene.attempts("hopeless")
    assert 1 <= len(attempts) <= 4
    assert "NotFinite" in attempts[-1].why
