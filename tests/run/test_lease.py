"""One holder at a time, and a fence that keeps earlier incarnations from writing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcft import disk
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


def test_a_job_that_has_the_number_of_one_that_gave_the_run_back_long_ago_takes_it(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7", restart=2, attempt=1))
    again = {**slurm_job("7", restart=0, attempt=1), "SLURM_JOB_START_TIME": str(int(time.time()) + 60)}
    with pytest.raises(Refusal, match="restart 2 holds"):
        lease.take(paths, again)
    lease.release(paths, slurm_job("7", restart=2, attempt=1))
    with pytest.raises(Refusal, match="restart 2 had the run last"):
        lease.take(paths, {**again, "SLURM_JOB_START_TIME": "1"})
    assert lease.take(paths, again).restart == 0


def test_a_new_attempt_fences_off_the_ranks_of_the_last_one(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7", attempt=1))
    lease.take(paths, slurm_job("7", attempt=2))
    assert not lease.still_mine(paths, slurm_job("7", attempt=1))


def test_a_rank_that_outlives_its_job_is_kept_out_and_the_next_job_comes_in_at_once(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7", restart=1, attempt=3))
    lease.release(paths, slurm_job("7", restart=1))
    for restart, attempt in ((0, 2), (1, 3)):
        assert not lease.free_or_mine(paths, slurm_job("7", restart, attempt))
    with pytest.raises(Refusal, match="restarted elsewhere"):
        lease.take(paths, slurm_job("7", restart=0, attempt=4))
    lease.take(paths, slurm_job("8"))  # Slurm is not asked about job 7
    assert lease.free_or_mine(paths, slurm_job("8"))
    assert not lease.free_or_mine(paths, slurm_job("7", restart=1, attempt=3))


def test_a_rank_started_by_hand_may_write_where_nobody_holds_the_run(paths: RunPaths) -> None:
    assert lease.free_or_mine(paths, {})
    lease.take(paths, slurm_job("7"))
    assert not lease.free_or_mine(paths, {})
    lease.release(paths, slurm_job("7"))
    assert lease.free_or_mine(paths, {})


def test_a_job_that_gave_the_run_back_may_be_requeued_and_takes_it_again(paths: RunPaths) -> None:
    lease.take(paths, slurm_job("7"), "abc")
    lease.release(paths, slurm_job("7"))
    assert lease.take(paths, slurm_job("7", restart=1)).plan == "abc"
    assert lease.still_mine(paths, slurm_job("7", restart=1))


def failing(monkeypatch: pytest.MonkeyPatch, error: int, times: int) -> None:
    """The next ``times`` readings of a lease fail as a file server's do."""
    left, read = [times], Path.read_text

    def fails(path: Path, *words: str, **options: str) -> str:
        if path.name == "lease.json" and left[0]:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return read(path, *words, **options)

    monkeypatch.setattr(Path, "read_text", fails)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
def test_a_lease_that_cannot_be_read_for_a_moment_is_still_held(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    lease.take(paths, slurm_job("7"))
    says(monkeypatch, State.RUNNING)
    failing(monkeypatch, error, 2)
    with pytest.raises(Refusal, match="job 7"):
        lease.take(paths, slurm_job("8"))
    failing(monkeypatch, error, 2)
    assert lease.still_mine(paths, slurm_job("7"))


def test_a_lease_that_cannot_be_read_is_taken_by_nobody(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.take(paths, slurm_job("7"))
    monkeypatch.setattr(lease, "READ_SECONDS", 0.2)
    failing(monkeypatch, errno.EIO, 1000)
    with pytest.raises(lease.Unanswered, match="who holds the run cannot be read"):
        lease.take(paths, slurm_job("8"))
    with pytest.raises(OSError, match="Input/output error"):  # which a save reports, and does not take for a fence
        lease.still_mine(paths, slurm_job("7"))


def test_a_lease_of_an_older_or_newer_release_is_understood(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {"job": "7", "restart": 1, "attempt": 2, "node": "n2", "plan": "abc", "time": 0.0}
    says(monkeypatch, State.RUNNING)
    for text in (older, older | {"colour": "red"}):
        paths.lease.write_text(json.dumps(text))
        assert lease.still_mine(paths, slurm_job("7", 1, 2))
        with pytest.raises(Refusal, match="job 7"):
            lease.take(paths, slurm_job("8"))
    lease.take(paths, slurm_job("7", 1, 3))
    assert "released" not in json.loads(paths.lease.read_text()), "older releases would take the run for nobody's"


def test_a_full_disk_keeps_the_run_held_until_the_job_has_ended(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease.take(paths, slurm_job("7"))
    with monkeypatch.context() as full:
        full.setattr(disk, "replace", no_space)
        lease.release(paths, slurm_job("7"))
    says(monkeypatch, State.COMPLETED)
    lease.take(paths, slurm_job("8"))


def no_space(*words: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
