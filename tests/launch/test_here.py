"""Runs on this machine without Slurm: submitit's local executor, real processes, a trainer that only counts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch import background, ranks, watch
from hpcft.launch.background import submit_here
from hpcft.launch.decide import Action
from hpcft.launch.local import Stop, run_here
from hpcft.launch.logs import follow
from hpcft.launch.render import render
from hpcft.launch.transport import Submitted
from hpcft.plan.plan import Plan
from hpcft.run import lease, ledger
from hpcft.run.ledger import Event, read_events
from hpcft.run.paths import RunPaths
from tests.launch.conftest import furnish
from tests.plans import layout, plan


def two_ranks(**changes: Any) -> Plan:
    return plan(layout=layout(1, 2), **changes)


@pytest.fixture
def here(tmp_path: Path, standin: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Submitted]:
    def start(plan: Plan, **environ: str) -> Submitted:
        furnish(tmp_path, plan)
        monkeypatch.chdir(tmp_path)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return submit_here(plan, render(plan))

    return start


def events(run: Path, name: str) -> list[Event]:
    return [event for event in read_events(RunPaths(run)) if event["event"] == name]


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_file_of_the_project_is_not_taken_for_a_module_of_pythons(
    here: Callable[..., Submitted], tmp_path: Path
) -> None:
    (tmp_path / "inspect.py").write_text("raise SystemExit('a script of the project')\n")
    assert watch.wait_until_ended(here(two_ranks()).run, 120).state == "finished"


def test_a_run_finishes_here_and_its_log_can_be_followed(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks())
    lines = list(follow(RunPaths(sent.run), lambda: not watch.status(sent.run).alive))
    assert lines == ["== attempt 1", "rank 0 did its steps"]
    now = watch.wait_until_ended(sent.run, 120)
    assert (now.state, now.step, now.saved, now.total) == ("finished", 10, 10, 4)
    assert now.batch_log == sent.run / f"jobs/{sent.job_id}_0_log.out"
    assert [(attempt.number, attempt.ending) for attempt in now.attempts] == [(1, "finished")]


def test_a_killed_rank_is_named_and_the_run_goes_on(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks(), STANDIN_DIE="1:1:5")
    now = watch.wait_until_ended(sent.run, 120)
    assert now.state == "finished"
    first, second = now.attempts
    assert first.why.startswith("rank 1 on this machine failed: was killed by SIGKILL")
    assert second.first_step == first.last_saved


def test_a_run_that_always_dies_stops_and_says_so(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks(budgets={"failures": 0}), STANDIN_DIE="1:0:5")
    now = watch.wait_until_ended(sent.run, 120)
    assert now.state == "stopped"
    assert "the budget is 0" in now.why


def test_cancel_lets_the_ranks_save_and_nothing_starts_again(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks(), STANDIN_STEPS="2000")
    until(lambda: events(sent.run, "saved"))
    watch.cancel(sent.run)
    now = watch.wait_until_ended(sent.run, 120)
    until(lambda: lease.holder(RunPaths(sent.run)) is None)
    assert now.state == "cancelled"
    assert [event["reason"] for event in events(sent.run, "saved")][-1] == "stop"
    assert len(events(sent.run, "attempt_began")) == 1


def test_a_run_that_is_stopped_on_a_full_disk_does_not_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, plan())
    monkeypatch.chdir(tmp_path)
    paths, stop, write = RunPaths(tmp_path / "runs/tiny"), Stop(), ledger._append

    def stopped(started: Sequence[ranks.Rank], died: Callable[..., None]) -> int:
        stop.asked = True
        return max(rank.process.wait() for rank in started)

    def full(path: os.PathLike[str], text: str) -> None:
        if stop.asked:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(ledger, "_append", full)
    monkeypatch.setattr(ranks, "watch", stopped)
    assert run_here(plan(), plan().to_json(), paths, stop, ["true"]) == Action.STOP.value
    assert len(events(paths.root, "attempt_began")) == 1


def test_a_second_submission_of_a_live_run_is_refused_and_names_the_holder(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks(), STANDIN_STEPS="2000")
    holder = lease.holder(RunPaths(sent.run))
    assert holder is not None
    with pytest.raises(Refusal, match=holder.job):
        here(two_ranks())
    os.kill(holder.pid, signal.SIGTERM)
    watch.wait_until_ended(sent.run, 120)


def test_the_run_lives_in_a_session_of_its_own(here: Callable[..., Submitted]) -> None:
    sent = here(two_ranks(), STANDIN_STEPS="200")
    assert os.getsid(int(sent.job_id)) != os.getsid(0)
    watch.cancel(sent.run)
    watch.wait_until_ended(sent.run, 120)


def test_a_run_that_another_submission_has_begun_is_not_taken_for_this_one(tmp_path: Path) -> None:
    paths, environ = RunPaths(tmp_path), {"HPCFT_JOB": lease.local_job()}
    paths.jobs.mkdir()
    lease.take(paths, environ)
    ledger.Ledger(paths, "batch", environ).write("accepted")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"]) as controller:
        (paths.jobs / f"{controller.pid}_0_log.out").write_text("the run is held by a process\n")
        with pytest.raises(Refusal, match="the run ended at once: the run is held by a process"):
            background._wait_until_begun(paths, controller.pid)
    background._wait_until_begun(paths, os.getppid())
