"""Real signals from a real Slurm: each cause is seen by a rank, and only the right ones bring the job back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcft.slurm.job import show_job
from hpcft.slurm.requeue import cancel, requeue, signal_ranks
from hpcft.slurm.states import State
from tests.loopback import LoopbackSlurm

REPOSITORY = Path(__file__).resolve().parents[2]
RANK = f"env PYTHONPATH={REPOSITORY} {sys.executable} {REPOSITORY}/tests/slurm/rank.py"
ONE_NODE = ("--nodes=1", "--exclusive", "--open-mode=append")


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)


class Job:
    """A job of one signalled rank and what the rank wrote."""

    def __init__(self, slurm: LoopbackSlurm, folder: Path, *options: str, stay: float = 0, lead: int = 5) -> None:
        self.slurm, self.notes = slurm, folder / "notes"
        body = f"trap : TERM USR2\nsrun -n1 {RANK} {self.notes} {stay} {lead} &\nwait; wait; wait"
        self.id = slurm.submit(body, *ONE_NODE, *options, cwd=folder)
        self.started(0)

    def started(self, restart: int, seconds: float = 120) -> None:
        """Wait until the rank of this start has its handlers."""
        until(self.notes.with_name(f"notes.ready-{restart}").exists, seconds)

    def wrote(self) -> list[str]:
        until(self.notes.exists)
        return self.notes.read_text().splitlines()


def evict(slurm: LoopbackSlurm, job: Job, seconds: int = 3) -> None:
    """A job of high priority takes the node away."""
    node = show_job(job.id).node_list
    slurm.submit(f"sleep {seconds}", "--partition=high", "--exclusive", f"--nodelist={node}")


def test_a_preemption_with_grace_is_known_requeued_once_and_the_job_comes_back(
    slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "--partition=low")
    evict(slurm, job)
    assert job.wrote() == ["0 SIGTERM PREEMPTED True"]
    job.started(1)
    assert show_job(job.id).restarts == 1

    cancel(job.id)
    slurm.wait_for(job.id, State.CANCELLED)
    assert job.wrote()[1:] == ["1 SIGTERM CANCELLED None"]


def test_a_preemption_without_grace_is_seen_as_requeued_already(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--partition=low0")
    evict(slurm, job)
    assert job.wrote() == ["0 SIGTERM REQUEUED None"]
    job.started(1)


def test_a_preemption_that_may_not_requeue_is_known(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--partition=low0", "--no-requeue")
    evict(slurm, job)
    assert job.wrote() == ["0 SIGTERM PREEMPTED_NO_REQUEUE None"]
    slurm.wait_for(job.id, State.PREEMPTED)


def test_a_plain_scancel_ends_the_job_for_good(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    slurm.run(["scancel", job.id])
    slurm.wait_for(job.id, State.CANCELLED)
    assert job.wrote() == ["0 SIGTERM CANCELLED None"]
    assert show_job(job.id).restarts == 0


def test_a_signal_sent_by_hand_is_known_and_the_job_is_left_alone(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, stay=60)
    signal_ranks(job.id, "USR2")
    assert job.wrote() == ["0 SIGUSR2 BY_HAND None"]
    assert slurm.state(job.id) is State.RUNNING


def test_the_teardown_after_a_peers_death_is_known(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    dies = f"while [ ! -e {notes}.ready-0 ]; do sleep .1; done; exit 3"
    ranks = f"if [ $SLURM_PROCID = 1 ]; then {dies}; else exec {RANK} {notes} 0 5; fi"
    job = slurm.submit(f"srun -n2 --kill-on-bad-exit=1 bash -c '{ranks}'", "--ntasks=2", cwd=tmp_path)
    slurm.wait_for(job, State.FAILED)
    assert notes.read_text() == "0 SIGTERM TEARDOWN None\n"


@pytest.mark.slow
def test_the_warning_before_the_time_limit_is_known_and_requeued(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    # Slurm looks every 30 s and warns up to 30 s early: here from 20 s on, when the rank has its handlers.
    job = Job(slurm, tmp_path, "--time=2", "--signal=USR2@70", lead=70)
    until(job.notes.exists)
    assert job.wrote() == ["0 SIGUSR2 TIME_LIMIT True"]
    job.started(1)


def test_an_array_element_is_requeued_alone(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    array = slurm.submit("sleep 300", "--array=1-2", "--ntasks=1")
    for element in "12":
        slurm.wait_for(f"{array}_{element}", State.RUNNING)
    environ = {"SLURM_JOB_ID": "0", "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "2"}
    assert requeue(environ, seconds=60)
    assert show_job(f"{array}_2").restarts == 1
    assert (show_job(f"{array}_1").restarts, slurm.state(f"{array}_1")) == (0, State.RUNNING)


def test_a_requeue_waits_for_a_controller_that_is_away(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    job = slurm.submit("sleep 300")
    slurm.wait_for(job, State.RUNNING)
    slurm.stop_controller()
    try:
        assert not requeue({"SLURM_JOB_ID": job}, seconds=0.5)
    finally:
        slurm.start_controller()
    assert requeue({"SLURM_JOB_ID": job}, seconds=60)
    assert requeue({"SLURM_JOB_ID": job}, seconds=60), "it is in the queue, whoever put it there"


def test_a_job_that_may_not_be_requeued_says_no_at_once(slurm: LoopbackSlurm) -> None:
    job = slurm.submit("sleep 300", "--no-requeue")
    slurm.wait_for(job, State.RUNNING)
    begin = time.monotonic()
    assert not requeue({"SLURM_JOB_ID": job}, seconds=300)
    assert time.monotonic() - begin < 60


def test_outside_slurm_nothing_is_requeued() -> None:
    assert not requeue({}, seconds=30)
