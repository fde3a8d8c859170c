"""A job's facts and state, while it runs, when it has ended, and when Slurm has forgotten it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcft.slurm.job import JobUnknown, job_state, job_states, parse_job, show_job
from hpcft.slurm.limits import limits, parse_limits
from hpcft.slurm.partitions import partitions
from hpcft.slurm.requeue import cancel
from hpcft.slurm.states import State
from tests.loopback import LoopbackSlurm


def test_a_running_job_is_read_whole(slurm: LoopbackSlurm) -> None:
    job = slurm.submit(
        "sleep 300", "--nodes=2", "--time=0:30:00", "--job-name=train", "--exclude=n4", "--partition=low"
    )
    slurm.wait_for(job, State.RUNNING)
    facts = show_job(job)
    assert (facts.job_id, facts.name, facts.state, facts.reason) == (job, "train", State.RUNNING, None)
    assert (facts.restarts, facts.requeue, facts.preempt_time, facts.time_limit) == (0, True, None, 30)
    assert (facts.partition, facts.nodes, facts.excluded) == ("low", 2, "n4")
    assert facts.node_list == "n[1-2]"
    assert facts.batch_host == "n1"
    assert facts.start_time is not None
    assert facts.end_time is not None
    assert abs(facts.start_time - time.time()) < 30
    assert facts.end_time - facts.start_time == 1800
    assert facts.work_dir == str(slurm.folder)
    assert facts.stdout == f"{slurm.folder}/job-{job}.log"


def test_a_finished_job_keeps_its_state_and_exit_code_without_accounting(slurm: LoopbackSlurm) -> None:
    job = slurm.submit("exit 7")
    slurm.wait_for(job, State.FAILED)
    assert job_state(job) is State.FAILED
    assert show_job(job).exit_code == (7, 0)
    assert not limits().accounting


def test_a_job_that_slurm_does_not_know_is_forgotten_not_unknown(slurm: LoopbackSlurm) -> None:
    assert job_state("999999") is State.FORGOTTEN
    with pytest.raises(JobUnknown, match="999999"):
        show_job("999999")


def test_with_the_controller_away_a_job_is_unknown_not_forgotten(slurm: LoopbackSlurm) -> None:
    slurm.stop_controller()
    try:
        assert job_state("999999") is State.UNKNOWN
    finally:
        slurm.start_controller()


def test_what_squeue_cannot_say_is_unknown_not_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, code in (("squeue", 1), ("sacct", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: Unspecified error' >&2\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["1", "2_3"]) == {"1": State.UNKNOWN, "2_3": State.UNKNOWN}


def test_without_slurm_a_job_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert job_state("1") is State.UNKNOWN


def test_a_job_name_cannot_pretend_to_be_facts(slurm: LoopbackSlurm) -> None:
    name = "x UserId=me(1) JobState=FAILED Reason=TimeLimit Restarts=9 Requeue=0"
    job = slurm.submit("sleep 300", f"--job-name={name}", "--comment=Restarts=8 PreemptTime=2030-01-01T00:00:00")
    slurm.wait_for(job, State.RUNNING)
    facts = show_job(job)
    assert (facts.name, facts.state, facts.reason, facts.restarts) == (name, State.RUNNING, None, 0)
    assert facts.preempt_time is None


def test_unknown_and_missing_fields_are_none() -> None:
    facts = parse_job(
        "JobId=5 JobName=a b UserId=me(1) GroupId=me(1) JobState=PENDING Reason=Resources Requeue=1 Restarts=2 "
        "TimeLimit=UNLIMITED StartTime=Unknown EndTime=Unknown PreemptTime=None NodeList=(null) ExitCode=0:15"
    )
    assert (facts.name, facts.state, facts.reason, facts.restarts) == ("a b", State.PENDING, "Resources", 2)
    assert (facts.start_time, facts.end_time, facts.time_limit, facts.node_list) == (None, None, None, None)
    assert facts.exit_code == (0, 15)


def test_an_array_element_is_read_by_its_own_id(slurm: LoopbackSlurm) -> None:
    array = slurm.submit("sleep 300", "--array=3-4", "--job-name=sweep")
    slurm.wait_for(f"{array}_4", State.RUNNING)
    assert (show_job(f"{array}_4").name, job_state(f"{array}_4")) == ("sweep", State.RUNNING)


def test_partitions_are_read_with_their_limits(slurm: LoopbackSlurm) -> None:
    found = partitions()
    assert sorted(found) == ["batch", "high", "low", "low0"]
    assert (found["low"].preempt_mode, found["low"].grace, found["low"].max_minutes) == ("requeue", 10, 120)
    assert (found["low0"].grace, found["high"].preempt_mode, found["high"].max_minutes) == (0, "off", None)
    assert (found["batch"].default, found["low"].default) == (True, False)
    assert (found["batch"].total_nodes, found["batch"].total_cpus, found["batch"].nodes) == (4, 16, "n[1-4]")


def test_the_controllers_limits_are_read(slurm: LoopbackSlurm) -> None:
    found = limits()
    assert (found.cluster, found.kill_wait, found.job_requeue, found.user_signal) == ("loopback", 10, True, False)
    assert (found.preempt_mode, found.preempt_type, found.max_array_size) == ("requeue", "partition_prio", 1001)
    assert found.version.startswith("2")


@pytest.mark.parametrize(
    "line",
    ["PreemptParameters       = send_user_signal,youngest_first", "SlurmctldParameters  = preempt_send_user_signal"],
)
def test_both_names_of_the_user_signal_option_are_known(line: str) -> None:
    assert parse_limits(line).user_signal
    assert not parse_limits("SlurmctldParameters = (null)").user_signal


def test_requeue_exit_codes_are_read() -> None:
    assert parse_limits("RequeueExit             = 99,100\nRequeueExitHold = 98").requeue_exit == (99, 100)
    assert parse_limits("RequeueExit             = (null)").requeue_exit == ()


def test_the_states_of_many_jobs_and_elements_are_asked_for_at_once(slurm: LoopbackSlurm) -> None:
    ended, array = slurm.submit("exit 1"), slurm.submit("sleep 300", "--array=0-3", "--hold")
    slurm.wait_for(ended, State.FAILED)
    cancel(f"{array}_2")
    asked = [f"{array}_1", "999999", f"{array}_2", f"{array}_77", ended]
    found = {job: state.name for job, state in job_states(asked).items()}
    assert found == dict(zip(asked, ["PENDING", "FORGOTTEN", "CANCELLED", "FORGOTTEN", "FAILED"], strict=True))
    assert found == {job: job_state(job).name for job in asked}
    assert job_states([]) == {}
    slurm.stop_controller()
    try:
        assert set(job_states(asked).values()) == {State.UNKNOWN}
    finally:
        slurm.start_controller()


def test_an_array_is_no_larger_than_any_of_the_limits() -> None:
    text = "MaxArraySize = 1001\nSchedulerParameters = bf_interval=1,max_array_tasks=500,max_script_size=99"
    assert (parse_limits(text).max_array_size, parse_limits(text).script_bytes) == (500, 99)
    assert (parse_limits("").max_array_size, parse_limits("").script_bytes) == (1001, 4 * 2**20)
