"""One holder at a time, and a fence that keeps earlier incarnations from writing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.errors import Refusal
from hpcft.run import lease
from hpcft.run.paths import RunPaths
from hpcft.slurm.states import State
from tests.loopback import LoopbackSlurm


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def slurm_job(job: str, restart: int = 0, attempt: int = 1) -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart), "HPCFT_ATTEMPT": str(attempt)}


def says(monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    monkeypatch.setattr(lease, "job_state", lambda job: state)


def test_who_takes_a_free_run_holds_it_and_may_give_it_back(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7"), "abc")
    assert lease.still_mine(paths, slurm_job("7"))
    lease.release(paths, slurm_job("7"))
    assert lease.holder(paths) is None
    assert not lease.still_mine(paths, slurm_job("7"))


@pytest.mark.parametrize("state", [State.RUNNING, State.PENDING, State.COMPLETING])
def test_a_live_job_keeps_others_out_and_is_named(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    lease.take(paths, slurm_job("7"))
    says(monkeypatch, state)
    with pytest.raises(Refusal, match="job 7"):
        lease.take(paths, slurm_job("8"))
    assert lease.still_mine(paths, slurm_job("7"))


@pytest.mark.parametrize("state", [State.FAILED, State.FORGOTTEN, State.CANCELLED, State.NODE_FAIL])
def test_a_job_that_is_gone_is_taken_over_from(paths: RunPaths, monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    lease.take(paths, slurm_job("7"))
    says(monkeypatch, state)
    lease.take(paths, slurm_job("8"))
    assert not lease.still_mine(paths, slurm_job("7"))
    assert lease.still_mine(paths, slurm_job("8"))


def test_while_slurm_cannot_be_asked_nothing_is_taken_over(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.take(paths, slurm_job("7"))
    says(monkeypatch, State.UNKNOWN)
    with pytest.raises(Refusal, match="cannot be asked"):
        lease.take(paths, slurm_job("8"))


def test_a_restarted_job_fences_off_its_earlier_incarnation(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7", restart=0, attempt=1))
    lease.take(paths, slurm_job("7", restart=1, attempt=2))
    assert not lease.still_mine(paths, slurm_job("7", restart=0, attempt=1))
    with pytest.raises(Refusal, match="restart 1 holds"):
        lease.take(paths, slurm_job("7", restart=0, attempt=3))
    lease.release(paths, slurm_job("7", restart=0, attempt=1))
    assert lease.still_mine(paths, slurm_job("7", restart=1, attempt=2))


def test_a_new_attempt_fences_off_the_ranks_of_the_last_one(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7", attempt=1))
    lease.take(paths, slurm_job("7", attempt=2))
    assert not lease.still_mine(paths, slurm_job("7", attempt=1))


def test_a_live_process_holds_a_run_without_slurm_and_a_dead_one_does_not(paths: RunPaths) -> None:
    code = (
        "import sys; from pathlib import Path; from hpcft.run import lease; from hpcft.run.paths import RunPaths\n"
        "lease.take(RunPaths(Path(sys.argv[1])), {'HPCFT_JOB': lease.local_job()}); print('taken', flush=True); input()"
    )
    root = Path(__file__).resolve().parents[2]
    args = [sys.executable, "-c", code, str(paths.root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(args, stdin=pipe, stdout=pipe, cwd=root) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(Refusal, match=f"process {other.pid}"):
            lease.take(paths, slurm_job("8"))
        other.kill()
        other.wait()
        lease.take(paths, slurm_job("8"))
    assert lease.still_mine(paths, slurm_job("8"))


def test_a_process_that_got_a_dead_holders_id_is_not_the_holder(paths: RunPaths) -> None:
    mine = lease.take(paths, {"HPCFT_JOB": lease.local_job()})
    assert lease.alive(mine)
    assert not lease.alive(dataclasses.replace(mine, born="1"))


def test_a_process_on_another_machine_cannot_be_judged_from_here(paths: RunPaths) -> None:
    mine = lease.take(paths, {"HPCFT_JOB": lease.local_job()})
    with pytest.raises(Refusal, match="other-machine"):
        lease.alive(dataclasses.replace(mine, node="other-machine"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1, "more": 2}'])
def test_a_lease_that_says_nothing_holds_nothing(paths: RunPaths, text: str) -> None:
    paths.lease.write_text(text)
    assert lease.holder(paths) is None
    lease.take(paths, slurm_job("8"))
    assert json.loads(paths.lease.read_text())["job"] == "8"
    assert paths.lease.stat().st_mode & 0o077 == 0


def test_outside_a_job_nothing_can_be_held(paths: RunPaths) -> None:
    with pytest.raises(Refusal, match="inside a job"):
        lease.take(paths, {})


def test_a_real_job_is_found_alive_and_then_dead(slurm: LoopbackSlurm, paths: RunPaths) -> None:
    job = slurm.submit("sleep 60")
    slurm.wait_for(job, State.RUNNING)
    lease.take(paths, slurm_job(job))
    with pytest.raises(Refusal, match=f"job {job}"):
        lease.take(paths, slurm_job("999999"))
    slurm.run(["scancel", job])
    slurm.wait_for(job, State.CANCELLED)
    lease.take(paths, slurm_job("999999"))
