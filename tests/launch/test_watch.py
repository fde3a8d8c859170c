"""What a run's status says while it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch import transport, watch
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


def test_a_run_that_is_removed_while_the_runs_are_listed_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stays", "goes"):
        paths = RunPaths(tmp_path / name)
        paths.root.mkdir()
        paths.script.write_text("")
    found = is_run

    def removed(folder: Path) -> bool:
        was = found(folder)
        shutil.rmtree(tmp_path / "goes", ignore_errors=True)
        return was

    monkeypatch.setattr(watch, "is_run", removed)
    assert "stays" in [run.name for run in watch.runs(tmp_path)]
