"""The rendered script on a real Slurm: two nodes, two ranks each, and a trainer that only counts."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcft.launch.array import arrays
from hpcft.launch.render import render, render_array
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.ledger import Event, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.job import show_job
from hpcft.slurm.states import State
from tests.launch.conftest import ROOT, STANDIN, furnish
from tests.loopback import LoopbackSlurm
from tests.plans import layout, plan

ENDED = {State.COMPLETED, State.FAILED, State.CANCELLED, State.TIMEOUT, State.PREEMPTED, State.NODE_FAIL}


class Job:
    """One rendered script, submitted with plain sbatch."""

    def __init__(self, slurm: LoopbackSlurm, folder: Path, plan: Plan, environ: dict[str, str]) -> None:
        self.slurm, self.folder, self.environ = slurm, folder, environ
        self.paths = RunPaths(folder / "runs" / plan.name)
        furnish(folder, plan)
        (folder / "job.sbatch").write_text(render(plan))
        self.id = self.submit()

    def submit(self) -> str:
        done = self.slurm.run(["sbatch", "--parsable", "job.sbatch"], environ=self.environ, cwd=self.folder)
        return done.stdout.strip()

    def end(self, seconds: float = 300) -> State:
        return self.slurm.wait_for(self.id, ENDED, seconds)

    def events(self, name: str) -> list[Event]:
        return [event for event in read_events(self.paths) if event["event"] == name]

    def until(self, true: Callable[[], Any], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.paths.root.glob("logs/*/*")]
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs) + str(read_events(self.paths))


def two_by_two(**resources: Any) -> Plan:
    asked = {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 2, "gpu_request": "gres"}
    return plan(layout=layout(2, 2), resources={**asked, "signal_lead": 60, **resources})


@pytest.fixture
def submit(slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str]) -> Callable[..., Job]:
    def start(plan: Plan, **environ: str) -> Job:
        return Job(slurm, tmp_path, plan, {**standin, **environ})

    return start


def test_a_job_runs_to_its_end_and_submitted_again_it_ends_at_once(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two())
    assert job.end() is State.COMPLETED, job.log()
    assert [event["step"] for event in job.events("finished")] == [10]
    assert [event["decision"] for event in job.events("attempt_ended")] == ["done"]
    assert len(list(job.paths.attempt(1).glob("rank-000[0-3].log"))) == 4
    assert lease.holder(job.paths) is None
    (log,) = job.folder.glob("tiny-*.log")
    assert log.stat().st_mode & 0o077 == 0, "not even where the umask of who called sbatch lets others read"
    job.id = job.submit()
    assert job.end() is State.COMPLETED
    assert len(job.events("attempt_began")) == 1


def test_a_killed_rank_is_named_and_the_run_goes_on_in_the_same_allocation(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(), STANDIN_STEPS="40", STANDIN_DIE="1:3:7")
    assert job.end() is State.COMPLETED, job.log()
    first, second = job.events("attempt_ended")
    assert (first["decision"], second["decision"]) == ("new_step", "done")
    assert "rank 3 on n2: Killed" in first["why"]
    again, saved = job.events("started")[1], [event for event in job.events("saved") if event["attempt"] == 1]
    assert again["time"] - saved[-1]["time"] < 60
    assert again["step"] == saved[-1]["step"]
    assert {event["restart"] for event in job.events("attempt_began")} == {0}


def test_a_job_submitted_from_a_step_of_another_job_is_as_one_from_a_login_node(submit: Callable[..., Job]) -> None:
    """What sbatch hands on would be the count of restarts, a core, GPUs, memory and the run folder of the other job."""
    other = {"SLURM_CPU_BIND": "quiet,map_cpu:0", "SLURM_GPUS_PER_NODE": "4", "SLURM_MEM_PER_CPU": "9"}
    left = {**other, "SLURM_RESTART_COUNT": "3", "HPCFT_JOB": "99", "HPCFT_RUN": "/somebody/elses"}
    job = submit(two_by_two(memory="200"), **left, STANDIN_STEPS="3")
    assert job.end() is State.COMPLETED, job.log()
    assert {event["restart"] for event in job.events("started")} == {0}


@pytest.mark.slow
def test_a_job_submitted_from_a_restarted_one_comes_back_after_a_preemption(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(partition="low"), STANDIN_STEPS="60", STANDIN_PACE="0.1", SLURM_RESTART_COUNT="3")
    job.until(lambda: job.events("saved"))
    job.slurm.submit("sleep 3", "--partition=high", "--nodes=4", "--exclusive")
    assert job.end() is State.COMPLETED, job.log()
    assert [event["restart"] for event in job.events("attempt_began")] == [0, 1]


def test_a_file_of_the_project_is_not_taken_for_a_module_of_pythons(submit: Callable[..., Job], tmp_path: Path) -> None:
    for name in ("inspect", "tokenize", "socket"):
        (tmp_path / f"{name}.py").write_text("print('a script of the project')\n")
    job = submit(two_by_two(), STANDIN_STEPS="3")
    assert job.end() is State.COMPLETED, job.log()
    assert "of the project" not in job.log()


def preparing(folder: Path, program: str) -> dict[str, str]:
    """The environment in which ``hpcft.data.prepare`` is ``program``."""
    package = folder / "standin" / "hpcft"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text((STANDIN / "hpcft" / "__init__.py").read_text())
    (package / "data" / "__init__.py").touch()
    (package / "data" / "prepare.py").write_text(program)
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), str(STANDIN), str(ROOT)])}


def test_data_that_cannot_be_prepared_in_the_job_ends_it_with_the_reason(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    fails = "import sys; print('Error: a.jsonl:3: broken JSON', file=sys.stderr); sys.exit(2)"
    job = submit(two_by_two(prepare="in_job"), **preparing(tmp_path, fails))
    assert job.end() is State.FAILED, job.log()
    (ended,) = job.events("attempt_ended")
    assert (ended["decision"], ended["ending"]) == ("stop", "refused")
    assert "a.jsonl:3: broken JSON" in ended["why"]
    assert not job.events("started")


@pytest.mark.slow
def test_data_that_is_prepared_in_the_job_past_its_time_limit_is_gone_on_with(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    slow = (
        "import pathlib, signal, sys, time\n"
        "first = pathlib.Path('first')\n"
        "if first.exists(): sys.exit(print('went on'))\n"
        "first.touch()\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "time.sleep(600)\n"
    )
    asked = two_by_two(time_minutes=1, signal_lead=20, prepare="in_job")
    job = submit(asked, **preparing(tmp_path, slow), STANDIN_STEPS="3")
    assert job.end() is State.COMPLETED, job.log()
    first, second = job.events("attempt_ended")
    assert (first["decision"], first["ending"], second["decision"]) == ("requeue", "time_limit", "done")
    assert "went on" in job.paths.prepare_log(job.id).read_text()


def test_scancel_ends_the_job_for_good(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(), STANDIN_STEPS="2000")
    job.until(lambda: job.events("saved"))
    job.slurm.run(["scancel", job.id])
    assert job.end() is State.CANCELLED
    time.sleep(8)
    assert job.slurm.state(job.id) is State.CANCELLED
    assert len(job.events("attempt_began")) == 1
    assert not job.events("requeued")


@pytest.mark.slow
def test_a_preempted_job_comes_back_and_goes_on_where_it_was(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(partition="low"), STANDIN_STEPS="60", STANDIN_PACE="0.1")
    job.until(lambda: job.events("saved"))
    other = job.slurm.submit("sleep 3", "--partition=high", "--nodes=4", "--exclusive")
    assert job.end() is State.COMPLETED, job.log()
    assert other
    assert [event["attempt"] for event in job.events("attempt_began")] == [1, 2]
    stopped = job.events("stopping")[0]
    assert stopped["cause"] == "preempted"
    assert job.events("started")[1]["step"] == stopped["step"]
    assert [event["by"] for event in job.events("requeued")] == ["rank 0"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.9, 1.5, 2.2, 3.0])
def test_scancel_at_any_moment_is_the_end(submit: Callable[..., Job], seconds: float) -> None:
    job = submit(two_by_two(), STANDIN_STEPS="2000", STANDIN_DIE="1:1:3")
    job.slurm.wait_for(job.id, State.RUNNING)
    time.sleep(seconds)  # begin, preflight, ranks, after, and the second attempt lie in this range
    before = len(job.events("attempt_began"))
    job.slurm.run(["scancel", job.id])
    assert job.end() is State.CANCELLED
    time.sleep(7)  # the private cluster would start a requeued job again after five seconds
    assert job.slurm.state(job.id) is State.CANCELLED
    assert not job.events("requeued")
    assert len(job.events("attempt_began")) <= before + 1
    assert not [event for event in job.events("started") if event["attempt"] > before + 1]


@pytest.mark.slow
def test_a_time_limit_is_survived(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(time_minutes=1, signal_lead=20), STANDIN_STEPS="9999")
    job.until(lambda: len(job.events("started")) == 2, 300)
    (job.folder / "enough").touch()
    assert job.end() is State.COMPLETED, job.log()
    stopped = job.events("stopping")[0]
    assert stopped["cause"] == "time_limit"
    assert job.events("started")[1]["step"] == stopped["step"]


@pytest.mark.slow
def test_a_rank_that_is_killed_near_the_time_limit_has_failed_and_the_job_comes_back(
    submit: Callable[..., Job],
) -> None:
    job = submit(two_by_two(time_minutes=2, signal_lead=60), STANDIN_STEPS="20", STANDIN_DIE="1:3:7")
    assert job.end() is State.COMPLETED, job.log()
    first, second = job.events("attempt_ended")
    assert (first["decision"], first["ending"], second["decision"]) == ("requeue", "failed", "done")
    assert "rank 3 on n2: Killed" in first["why"]
    assert [event["restart"] for event in job.events("attempt_began")] == [0, 1]


@pytest.mark.slow
def test_a_node_that_the_preflight_faults_is_left_out_of_the_next_attempt(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    # On n1 Python cannot be started, as where a file system was not mounted.
    other = tmp_path / "python"
    other.write_text(
        "#!/bin/bash\n"
        f'[ "${{SLURMD_NODENAME:-}}" = n1 ] && [ "${{SLURM_PROCID:-}}" ] && [[ "$*" == *launch.preflight ]] && exit 1\n'
        f'exec {sys.executable} "$@"\n'
    )
    other.chmod(0o700)
    job = submit(two_by_two(), HPCFT_PYTHON=str(other))
    assert job.end() is State.COMPLETED, job.log()
    first, second = job.events("attempt_began")
    assert "n1" in first["nodes"]
    assert "n1" not in second["nodes"]
    assert job.events("attempt_ended")[0]["decision"] == "requeue"


def unusable(folder: Path, where: str) -> str:
    """A Python that cannot be started where that shell condition holds, as on a node without its file system."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\n{where} && exit 127\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    return str(python)


def test_where_nothing_can_be_started_the_first_time_the_job_fails_at_once_with_the_reason(
    submit: Callable[..., Job],
) -> None:
    job = submit(two_by_two(), HPCFT_PYTHON="/no/such/python")
    assert job.end() is State.FAILED, job.log()
    assert "cannot run hpcft; do the profile's setup lines" in job.log()
    facts = show_job(job.id)
    assert facts.restarts == 0
    assert facts.start_time is not None
    assert facts.end_time is not None
    assert facts.end_time - facts.start_time < 20


@pytest.mark.slow
def test_a_job_that_comes_back_onto_a_node_where_nothing_can_be_started_goes_on_elsewhere(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    python = unusable(tmp_path, '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] && echo "$SLURMD_NODENAME" > bad')
    asked = two_by_two(nodes=1, partition="low", exclusive=True)
    job = submit(
        dataclasses.replace(asked, layout=layout(1, 2)), HPCFT_PYTHON=python, STANDIN_STEPS="60", STANDIN_PACE="0.1"
    )
    job.until(lambda: job.events("saved"))
    job.slurm.submit("sleep 1", "--partition=high", "--nodes=4", "--exclusive")
    assert job.end() is State.COMPLETED, job.log()
    assert [event["restart"] for event in job.events("attempt_began")] == [0, 2], job.log()
    bad = (tmp_path / "bad").read_text().strip()
    assert show_job(job.id).excluded == bad
    assert bad not in job.events("attempt_began")[1]["nodes"]


@pytest.mark.slow
def test_where_no_other_node_may_be_had_the_job_fails_and_does_not_wait_for_ever(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    python = unusable(tmp_path, '[ "${SLURM_RESTART_COUNT:-0}" = 1 ]')
    asked = two_by_two(nodes=1, extra=("--nodelist=n1",))
    asked = dataclasses.replace(asked, layout=layout(1, 2))
    job = submit(asked, HPCFT_PYTHON=python, STANDIN_STEPS="600", STANDIN_PACE="0.1")
    job.until(lambda: job.events("saved"))
    job.slurm.run(["scontrol", "requeue", job.id])
    job.until(lambda: show_job(job.id).restarts == 1)
    assert job.end() is State.FAILED, job.log()


@pytest.mark.slow
def test_a_node_where_nothing_can_be_started_does_not_take_the_elements_of_an_array(
    slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").write_text('#!/bin/sh\n[ "$1" = 60 ] && set -- 5\nexec /bin/sleep "$1"\n')
    (tmp_path / "bin" / "sleep").chmod(0o700)
    python = unusable(tmp_path, '[ "$SLURMD_NODENAME" = n1 ]')
    plans = [plan(name=f"run-{n}", layout=layout(1, 1), resources={"exclusive": True}) for n in range(6)]
    (array,) = arrays("sweep", plans)
    furnish(tmp_path, plans[0])
    (tmp_path / "sweep.sbatch").write_text(render_array(array))
    path = f"{tmp_path / 'bin'}:{slurm.environment['PATH']}"
    environ = {**standin, "HPCFT_PYTHON": python, "PATH": path, "STANDIN_STEPS": "3"}
    job = slurm.run(["sbatch", "--parsable", "sweep.sbatch"], environ=environ, cwd=tmp_path).stdout.strip()
    for element in range(6):
        slurm.wait_for(f"{job}_{element}", ENDED, 300)
    for one in plans:
        events = read_events(RunPaths(tmp_path / "runs" / one.name))
        assert [event["decision"] for event in events if event["event"] == "attempt_ended"] == ["done"], one.name
    assert "on n1: " in "".join(log.read_text() for log in tmp_path.glob("sweep-*.log"))


def test_a_script_without_prepared_data_says_so_and_is_not_tried_again(
    submit: Callable[..., Job], slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    job = submit(two_by_two(), STANDIN_STEPS="1")
    for file in (tmp_path / "prepared/requests").iterdir():
        file.unlink()
    assert job.end() is State.FAILED, job.log()
    (log,) = tmp_path.glob("tiny-*.log")
    assert "hpcft prepare RUN.yaml" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(job.events("attempt_began")) == 1


@pytest.mark.slow
def test_a_node_lost_in_the_middle_brings_the_run_back_on_others(submit: Callable[..., Job]) -> None:
    job = submit(two_by_two(), STANDIN_STEPS="9999", STANDIN_PACE="0.1")
    job.until(lambda: job.events("saved"))
    first = job.events("attempt_began")[0]
    lost = first["nodes"][1]
    job.slurm.kill_node(lost)
    try:
        job.until(lambda: len(job.events("started")) == 2, 300)
        (job.folder / "enough").touch()
        assert job.end() is State.COMPLETED, job.log()
        assert lost not in job.events("attempt_began")[-1]["nodes"], job.log()
        assert job.events("started")[-1]["step"] > 0
    finally:
        job.slurm.start_node(lost)
