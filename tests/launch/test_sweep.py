"""Sweeps on a real Slurm: arrays of runs that wait, run, come back and end one by one, with a trainer that counts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch import sweep as sweeps
from hpcft.launch import transport, watch
from hpcft.launch.array import arrays
from hpcft.launch.render import render_array
from hpcft.launch.sweep import Sweep, submit_sweep
from hpcft.plan.plan import Plan, PreparePlan
from hpcft.run.folder import read_plan
from hpcft.run.ledger import Event, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.job import job_states, show_job
from hpcft.slurm.states import State
from tests.launch.conftest import furnish
from tests.loopback import LoopbackSlurm
from tests.plans import plan

LATER = {"extra": ("--begin=now+1hour",)}


def runs(count: int, **resources: Any) -> list[Plan]:
    return [
        plan(name=f"run-{i}", train={"seed": i}, resources={"job_name": f"run-{i}", "signal_lead": 60, **resources})
        for i in range(count)
    ]


@pytest.fixture
def send(
    slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sweep]:
    def start(plans: list[Plan], **words: Any) -> Sweep:
        furnish(tmp_path, plans[0])
        monkeypatch.chdir(tmp_path)
        return submit_sweep("sweep", plans, **words)

    return start


def events(folder: Path, number: int, name: str = "") -> list[Event]:
    found = read_events(RunPaths(folder / f"runs/run-{number}"))
    return [event for event in found if not name or event["event"] == name]


def until(true: Callable[[], Any], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_every_run_of_a_sweep_finishes_in_its_own_folder_and_again_nothing_is_left(
    send: Callable[..., Sweep], tmp_path: Path
) -> None:
    sent = send(runs(3))
    array = sent.submitted[0].job_id.partition("_")[0]
    assert [one.job_id for one in sent.submitted] == [f"{array}_{i}" for i in range(3)]
    for number, one in enumerate(sent.submitted):
        now = watch.wait_until_ended(one.run, 180)
        assert (now.name, now.state, now.job, now.step) == (f"run-{number}", "finished", f"{array}_{number}", 10)
        assert now.batch_log is not None
        assert now.batch_log.is_file()
        assert Plan.from_json(RunPaths(one.run).plan.read_text()) == runs(3)[number]
        assert {event["job"] for event in events(tmp_path, number)} == {f"{array}_{number}"}
    assert len(list((tmp_path / "runs/.arrays/sweep").glob(f"sweep-{array}_[0-2].log"))) == 3
    assert not list(tmp_path.glob("*.log"))
    loose = [path for path in (tmp_path / "runs").glob("*/**/*") if not path.is_symlink()]
    assert loose
    assert not [path for path in loose if path.stat().st_mode & 0o077]
    with pytest.raises(Refusal, match="nothing of sweep sweep is left"):
        send(runs(3))


def test_a_sweep_submitted_again_takes_only_runs_that_nobody_has(
    send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    first = send(runs(4, **LATER))
    assert {watch.status(one.run).state for one in first.submitted} == {"pending"}
    assert [now.state for now in watch.runs(tmp_path / "runs")] == ["pending"] * 4
    log = tmp_path / f"runs/.arrays/sweep/sweep-{first.submitted[1].job_id}.log"  # as the elements above are named
    assert watch.status(first.submitted[1].run).batch_log == log
    watch.cancel(first.submitted[1].run)
    assert watch.status(first.submitted[1].run).state == "cancelled"
    until(lambda: slurm.state(first.submitted[1].job_id) is State.CANCELLED)
    again = send(runs(5))
    assert [one.run.name for one in again.submitted] == ["run-1", "run-4"]
    assert {root.name: why for root, why in again.left_out.items()} == {
        f"run-{i}": f"job {first.submitted[i].job_id} has it already" for i in (0, 2, 3)
    }
    for one in again.submitted:
        assert watch.wait_until_ended(one.run, 180).state == "finished"
    states = job_states([one.job_id for one in first.submitted])
    assert [state.name for state in states.values()] == ["PENDING", "CANCELLED", "PENDING", "PENDING"]


@pytest.mark.slow
def test_a_preempted_element_comes_back_as_itself_and_the_others_never_notice(
    send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last element is the one whose SLURM_JOB_ID stands for the whole array: it is the one to be requeued."""
    for name, value in {"STANDIN_STEPS": "100000", "STANDIN_PACE": "0.05"}.items():
        monkeypatch.setenv(name, value)
    sent = send(runs(3, partition="low", cpus_per_task=4))  # a node each
    ids = [one.job_id for one in sent.submitted]
    until(lambda: all(events(tmp_path, i, "saved") for i in range(3)))
    last = show_job(ids[2])
    assert last.job_id == ids[2].partition("_")[0]
    slurm.submit("sleep 1", "--partition=high", f"--nodelist={last.node_list}", "--exclusive")
    until(lambda: len(events(tmp_path, 2, "started")) == 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enough").touch()
    for one in sent.submitted:
        assert watch.wait_until_ended(one.run, 180).state == "finished"
    assert [event["by"] for event in events(tmp_path, 2, "requeued")] == ["rank 0"]
    stopped, again = events(tmp_path, 2, "stopping")[0], events(tmp_path, 2, "started")[1]
    assert (stopped["cause"], again["step"]) == ("preempted", stopped["step"])
    assert again["step"] > 0
    assert [event["job"] for event in events(tmp_path, 2, "attempt_began")] == [ids[2]] * 2
    assert [event["restart"] for event in events(tmp_path, 2, "attempt_began")] == [0, 1]
    for number in (0, 1):
        assert [event["restart"] for event in events(tmp_path, number, "attempt_began")] == [0]
        assert not events(tmp_path, number, "requeued")
        assert {event["job"] for event in events(tmp_path, number)} == {ids[number]}


def test_one_element_is_cancelled_for_good_and_the_others_run_on(
    send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_STEPS", "100000")
    sent = send(runs(3))
    until(lambda: all(events(tmp_path, i, "saved") for i in range(3)))
    watch.cancel(sent.submitted[2].run)
    until(lambda: slurm.state(sent.submitted[2].job_id) is State.CANCELLED)
    assert watch.status(sent.submitted[2].run).state == "cancelled"
    assert [watch.status(one.run).state for one in sent.submitted[:2]] == ["running", "running"]
    (tmp_path / "enough").touch()
    for one in sent.submitted[:2]:
        assert watch.wait_until_ended(one.run, 180).state == "finished"
    assert len(events(tmp_path, 2, "attempt_began")) == 1


def test_an_array_script_runs_with_plain_sbatch_and_one_element_of_it_alone(
    slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str]
) -> None:
    furnish(tmp_path, plan())
    (tmp_path / "sweep.sbatch").write_text(render_array(arrays("sweep", runs(3))[0]))
    environ = {**standin, "HPCFT_RUN": "/nowhere", "HPCFT_RUNS": str(tmp_path / "else where")}
    command = ["sbatch", "--parsable", "--array=1", "sweep.sbatch"]
    job = slurm.run(command, environ=environ, cwd=tmp_path).stdout.strip()
    slurm.wait_for(f"{job}_1", State.COMPLETED)
    assert [path.name for path in (tmp_path / "else where").iterdir()] == ["run-1"]
    assert watch.status(tmp_path / "else where/run-1").state == "finished"
    job = slurm.run(["sbatch", "--parsable", "--array=9", "sweep.sbatch"], environ=environ, cwd=tmp_path).stdout.strip()
    slurm.wait_for(f"{job}_9", State.FAILED)
    assert "this array has no such element" in (tmp_path / f"sweep-{job}_9.log").read_text()


def test_nothing_stays_when_slurm_refuses(send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="invalid partition") as refused:
        send(runs(3, partition="nowhere"))
    assert "sinfo -s" in refused.value.problems[0].hint
    assert not list((tmp_path / "runs").glob("run-*"))


def test_an_array_that_was_taken_is_taken_back_when_another_is_refused(
    send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def second_fails(executor: transport.ScriptExecutor) -> str:
        if taken:
            raise Refusal(())
        taken.append(transport.hand_over(executor))
        return taken[0]

    monkeypatch.setattr(sweeps, "hand_over", second_fails)
    with pytest.raises(Refusal):
        send([*runs(2, **LATER), plan(name="other", resources=LATER | {"time_minutes": 5})])
    assert taken
    assert not slurm.run(["squeue", "-h"]).stdout.strip()
    assert not (tmp_path / "runs/other").exists()


def test_every_run_with_another_plan_is_named_before_the_queue(
    send: Callable[..., Sweep], slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    for number in (0, 2):
        paths = RunPaths(tmp_path / f"runs/run-{number}")
        paths.root.mkdir(parents=True)
        paths.plan.write_text(plan(name=f"run-{number}", optim={"learning_rate": 1.0}).to_json())
    with pytest.raises(Refusal) as refused:
        send(runs(3))
    assert [Path(problem.where).parent.name for problem in refused.value.problems] == ["run-0", "run-2"]
    assert not slurm.run(["squeue", "-h"]).stdout.strip()
    assert not (tmp_path / "runs/run-1").exists()


@pytest.mark.parametrize(
    ("plans", "words", "match"),
    [
        ([], {}, "without runs"),
        (runs(1), {"at_once": 0}, "at_once"),
        ([plan(resources={"scheduler": "none"})], {}, "without Slurm"),
        ([plan(resources={"template": "own.j2"})], {}, "template"),
        ([plan(), plan()], {}, "have the same"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(plans: list[Plan], words: dict[str, Any], match: str) -> None:
    with pytest.raises(Refusal, match=match):
        submit_sweep("sweep", plans, **words)


def test_a_sweep_waits_for_no_preparation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    looked: list[str] = []

    def is_prepared(of: Plan, store: Path) -> bool:
        looked.append(of.name)
        return False

    monkeypatch.setattr(sweeps, "is_prepared", is_prepared)
    job = PreparePlan(partition="cpu", qos=None, cores=4, memory="8G", time_minutes=60, extra=())
    with pytest.raises(Refusal, match="waits for no preparation") as refused:
        submit_sweep("sweep", runs(3, prepare="job", prepare_job=job))
    assert "hpcft prepare" in refused.value.problems[0].hint
    assert len(looked) == 1, "data that several runs read is looked for once"
    assert not list(tmp_path.iterdir())


def test_an_element_that_never_began_has_the_plan_that_was_handed_over(tmp_path: Path) -> None:
    [wanted] = runs(1)
    paths = RunPaths(tmp_path)
    sweeps._Run(wanted, paths, fresh=True).prepare(wanted.to_json())
    assert read_plan(paths) == wanted


def test_sbatch_is_called_twice_for_an_array(
    send: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: LoopbackSlurm
) -> None:
    real = shutil.which("sbatch")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nexec {real} "$@"\n')
    (tmp_path / "bin/sbatch").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert len(send(runs(40, **LATER)).submitted) == 40
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--test-only" in call for call in calls] == [True, False]
