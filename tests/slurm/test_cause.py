"""The table of causes, row by row: what Slurm says of a signalled job, and what that means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hpcft.slurm.cause import Cause, classify, why_signalled
from hpcft.slurm.job import JobFacts, parse_job
from hpcft.slurm.states import State

NOW = 1_000_000.0
LEAD = 120.0

RUNNING = dataclasses.replace(
    parse_job("JobId=7 JobName=run UserId=me(1) GroupId=me(1) JobState=RUNNING Reason=None"),
    start_time=NOW - 3600,
    end_time=NOW + 36000,
)


def cause(signal: str = "TERM", restart_count: int = 0, **facts: Any) -> Cause:
    return classify(changed(**facts), signal, restart_count, LEAD, NOW)


def changed(**facts: Any) -> JobFacts:
    return dataclasses.replace(RUNNING, **facts)


def test_running_with_a_preempt_time_is_a_preemption_in_its_grace() -> None:
    assert cause(preempt_time=NOW - 1, end_time=NOW + 9) is Cause.PREEMPTED
    assert cause("USR2", preempt_time=NOW - 1, end_time=NOW + 9) is Cause.PREEMPTED


def test_running_near_the_end_is_the_time_limit() -> None:
    for signal in ("TERM", "USR2"):
        assert cause(signal, end_time=NOW + LEAD + 90) is Cause.TIME_LIMIT
        assert cause(signal, end_time=NOW - 20) is Cause.TIME_LIMIT
        assert cause(signal, end_time=NOW + LEAD + 91) is not Cause.TIME_LIMIT


def test_running_with_neither_is_a_hand_that_sent_usr2() -> None:
    assert cause("USR2") is Cause.BY_HAND
    assert cause("SIGUSR2", end_time=None) is Cause.BY_HAND


def test_running_with_neither_is_the_teardown_after_a_peers_death_when_it_is_term() -> None:
    assert cause("TERM") is Cause.TEARDOWN
    assert cause("SIGTERM", end_time=None) is Cause.TEARDOWN


def test_completing_for_the_time_limit_is_the_time_limit() -> None:
    assert cause(state=State.COMPLETING, reason="TimeLimit", end_time=NOW) is Cause.TIME_LIMIT


def test_completing_with_more_restarts_was_requeued_already() -> None:
    assert cause(state=State.COMPLETING, restarts=1) is Cause.REQUEUED
    assert cause(state=State.COMPLETING, restarts=3, restart_count=2, preempt_time=NOW) is Cause.REQUEUED


def test_completing_with_a_preempt_time_and_no_more_restarts_will_not_be_requeued() -> None:
    assert cause(state=State.COMPLETING, preempt_time=NOW - 5) is Cause.PREEMPTED_NO_REQUEUE


def test_completing_with_nothing_else_is_a_scancel() -> None:
    assert cause(state=State.COMPLETING) is Cause.CANCELLED
    assert cause(state=State.COMPLETING, restarts=2, restart_count=2) is Cause.CANCELLED


def test_a_preempt_time_from_before_this_start_belongs_to_an_earlier_attempt() -> None:
    assert cause("TERM", preempt_time=NOW - 7200, restarts=1, restart_count=1) is Cause.TEARDOWN
    assert cause(state=State.COMPLETING, preempt_time=NOW - 7200, restarts=1, restart_count=1) is Cause.CANCELLED


def test_a_rank_left_on_a_lost_node_learns_that_a_newer_attempt_runs() -> None:
    assert cause(state=State.RUNNING, restarts=1) is Cause.REQUEUED


def test_a_state_that_explains_nothing_is_never_requeued() -> None:
    assert cause(state=State.COMPLETING, reason="NonZeroExitCode") is Cause.UNKNOWN
    assert cause(state=State.UNKNOWN) is Cause.UNKNOWN


def test_only_preemptions_and_time_limits_are_requeued() -> None:
    assert {each for each in Cause if each.requeues} == {Cause.PREEMPTED, Cause.TIME_LIMIT}


def test_only_a_teardown_saves_nothing_and_only_a_hand_lets_training_go_on() -> None:
    assert {each for each in Cause if not each.saves} == {Cause.TEARDOWN}
    assert {each for each in Cause if each.goes_on} == {Cause.BY_HAND}


def test_outside_slurm_nobody_is_asked() -> None:
    assert why_signalled({}, "TERM", LEAD, 5) is Cause.NOT_SLURM


def test_without_scontrol_in_a_container_the_cause_is_unknown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert why_signalled({"SLURM_JOB_ID": "7"}, "TERM", LEAD, 60) is Cause.UNKNOWN
