"""What a run's status says while it ends."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch import transport, watch
from hpcft.launch.submissions import newest_job
from hpcft.run import lease
from hpcft.run.folder import is_run
from hpcft.run.ledger import JOB_VARIABLE, Ledger, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.states import State
from tests.plans import plan


@pytest.fixture
def held(tmp_path: Path) -> tuple[RunPaths, dict[str, str]]:
    """A run that this process holds, as one without Slurm does while it trains."""
    paths, environ = RunPaths(tmp_path), {JOB_VARIABLE: lease.local_job()}
    Ledger(paths, "batch", environ).write("attempt_began", restart=0)
    lease.take(paths, environ)
    return paths, environ


def submitted(folder: Path, *names: str) -> list[RunPaths]:
    """Runs beside each other, of which no more is there than the script."""
    every = [RunPaths(folder / name) for name in names]
    for paths in every:
        paths.root.mkdir()
        paths.script.write_text("")
    return every


def test_a_cancelled_run_is_being_cancelled_until_its_job_has_let_go(held: tuple[RunPaths, dict[str, str]]) -> None:
    paths, environ = held
    assert watch.status(paths.root).state == "running"
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    now = watch.status(paths.root)
    assert (now.state, now.alive) == ("cancelling", True)
    Ledger(paths, "batch", environ).write("attempt_ended", decision="stop", ending="cancelled", why="cancelled")
    assert watch.status(paths.root).state == "cancelled"


def test_a_job_that_died_before_it_could_say_so_is_cancelled_all_the_same(
    held: tuple[RunPaths, dict[str, str]],
) -> None:
    paths, environ = held
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    lease.release(paths, environ)
    assert watch.status(paths.root).state == "cancelled"


def test_a_run_that_is_being_cancelled_says_when_it_can_be_resumed(held: tuple[RunPaths, dict[str, str]]) -> None:
    paths, environ = held
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    with pytest.raises(Refusal, match="has this run already") as refused:
        transport.refuse_unsubmittable(plan(), paths)
    assert "try again when this says so: hpcft status" in str(refused.value)


def test_a_run_that_ends_in_the_moment_in_which_it_is_cancelled_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, alive = RunPaths(tmp_path), lease.alive
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as run:
        with monkeypatch.context() as held:
            held.setattr("os.getpid", lambda: run.pid)
            environ = {JOB_VARIABLE: lease.local_job()}
            lease.take(paths, environ)
        Ledger(paths, "batch", environ).write("attempt_began", restart=0)

        def ended(*about: Any) -> bool:
            was = alive(*about)
            if any(event["event"] == "cancelled" for event in read_events(paths)):
                run.kill()
                run.wait()
            return was

        monkeypatch.setattr(lease, "alive", ended)
        assert "has ended meanwhile" in watch.cancel(tmp_path)


@pytest.mark.parametrize("looks", ["status", "runs"])
def test_a_run_that_finishes_between_the_look_into_its_ledger_and_the_question_to_slurm_is_finished(
    looks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, environ = RunPaths(tmp_path / "run"), {JOB_VARIABLE: "7"}
    paths.root.mkdir()
    paths.script.write_text("")
    Ledger(paths, "batch", environ).write("attempt_began", restart=0)

    def ended(job: str) -> State:
        Ledger(paths, "rank-0000", environ).write("finished", step=4)
        return State.COMPLETED

    monkeypatch.setattr(watch, "job_state", ended)
    monkeypatch.setattr(watch, "job_states", lambda jobs: {job: ended(job) for job in jobs})
    (now,) = [watch.status(paths.root)] if looks == "status" else watch.runs(tmp_path)
    assert now.state == "finished"


def test_a_run_that_cannot_be_read_a_second_time_is_what_it_was_and_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for paths in submitted(tmp_path, "one", "other"):
        Ledger(paths, "batch", {JOB_VARIABLE: "7"}).write("attempt_began", restart=0)
    looks = dict[Path, int]()

    def lost(paths: RunPaths) -> Any:
        looks[paths.root] = looks.get(paths.root, 0) + 1
        if paths.root.name == "one" and looks[paths.root] > 1:
            raise OSError(errno.EIO, "Input/output error", str(paths.events))
        return read_events(paths)

    monkeypatch.setattr(watch, "read_events", lost)
    monkeypatch.setattr(watch, "job_states", lambda jobs: dict.fromkeys(jobs, State.COMPLETED))
    assert {run.name: run.state for run in watch.runs(tmp_path)} == {"one": "stopped", "other": "stopped"}


def at(seconds: float, monkeypatch: pytest.MonkeyPatch, paths: RunPaths, job: str, event: str, **facts: Any) -> None:
    """An event as a node writes it whose clock is so far ahead."""
    with monkeypatch.context() as ahead:
        ahead.setattr("hpcft.run.ledger.time.time", lambda now=time.time: now() + seconds)
        Ledger(paths, "batch", {JOB_VARIABLE: job, "HPCFT_ATTEMPT": str(facts.pop("attempt", 0))}).write(event, **facts)


def test_a_job_handed_over_after_one_whose_node_has_a_clock_ahead_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    paths.jobs.mkdir()
    at(300, monkeypatch, paths, "7", "accepted")
    (paths.jobs / "8_submission.sh").write_text("#!/bin/bash")
    assert newest_job(read_events(paths), paths) == "7", "it has not ended"
    at(301, monkeypatch, paths, "7", "attempt_ended", decision="stop", why="failed")
    monkeypatch.setattr(watch, "job_state", lambda job: State.PENDING if job == "8" else State.FAILED)
    now = watch.status(paths.root)
    assert (now.job, now.state) == ("8", "pending")
    at(0, monkeypatch, paths, "8", "cancelled")
    assert newest_job(read_events(paths), paths) == "7"


def test_of_attempts_on_nodes_with_other_clocks_the_last_one_says_why_the_run_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    at(300, monkeypatch, paths, "7", "attempt_ended", attempt=1, decision="requeue", why="preempted")
    at(0, monkeypatch, paths, "7", "attempt_ended", attempt=2, decision="stop", why="rank 1 failed")
    monkeypatch.setattr(watch, "job_state", lambda job: State.FAILED)
    assert watch.state_of(paths, read_events(paths), "7") == ("stopped", "rank 1 failed")


def test_a_run_that_is_removed_while_the_runs_are_listed_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path, "stays", "goes")
    found = is_run

    def removed(folder: Path) -> bool:
        was = found(folder)
        shutil.rmtree(tmp_path / "goes", ignore_errors=True)
        return was

    monkeypatch.setattr(watch, "is_run", removed)
    assert "stays" in [run.name for run in watch.runs(tmp_path)]
