"""What happens after a job step: every row of the table as a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from hpcft.launch.decide import Action, Decision, Ending, Facts, decide, spent
from hpcft.plan.plan import Budgets
from hpcft.run.ledger import Event
from hpcft.slurm.cause import Cause

BUDGETS = Budgets(failures=2, time_limits=2, without_progress=3)


class Story:
    """A ledger, told event by event."""

    def __init__(self, job: str = "7") -> None:
        self.events: list[Event] = []
        self.job, self.attempt = job, 0

    def _add(self, event: str, **facts: Any) -> Story:
        time = float(len(self.events))
        self.events.append(
            {"time": time, "event": event, "attempt": self.attempt, "job": self.job, "restart": 0, **facts}
        )
        return self

    def begins(self) -> Story:
        self.attempt += 1
        return self._add("attempt_began")

    def saves(self, step: int) -> Story:
        return self._add("saved", step=step)

    def tells(self, event: str, **facts: Any) -> Story:
        return self._add(event, **facts)

    def ends(self, ending: Ending) -> Story:
        return self._add("attempt_ended", ending=ending.value)

    def decide(self, code: int = 137, cause: Cause = Cause.TEARDOWN, **facts: Any) -> Decision:
        return decide(self.events, BUDGETS, Facts(code, self.attempt, self.job, cause, **facts))


def crashes(times: int, step: int = 0) -> Story:
    story = Story()
    for _ in range(times):
        story.begins()
        if step:
            step += 10
            story.saves(step)
        story.ends(Ending.FAILED)
    return story.begins()


def test_a_finished_run_is_done_whatever_the_exit_code() -> None:
    story = Story().begins().tells("finished", step=10)
    assert story.decide(code=143).action is Action.DONE


@pytest.mark.parametrize("code", [0, 1, 75, 137, 143])
def test_nothing_is_started_or_requeued_after_a_cancellation(code: int) -> None:
    story = Story().begins().saves(4)
    decision = story.decide(code, Cause.CANCELLED)
    assert (decision.action, decision.ending) == (Action.STOP, Ending.CANCELLED)


def test_a_cancellation_in_the_ledger_counts_even_when_slurm_says_nothing() -> None:
    decision = Story().begins().tells("cancelled", by="hpcft cancel").decide()
    assert decision.action is Action.STOP
    assert decision.why == "cancelled by hpcft cancel"


def test_a_cancelled_run_that_is_submitted_again_is_not_cancelled_any_more() -> None:
    story = Story("7").begins().tells("cancelled", by="hpcft cancel").ends(Ending.CANCELLED)
    story.job = "8"
    assert story.begins().decide().action is Action.NEW_STEP


def test_a_run_of_this_machine_that_has_the_name_of_a_cancelled_one_goes_on() -> None:
    story = Story("local-n-7").tells("accepted").begins().tells("cancelled", by="hpcft cancel").ends(Ending.CANCELLED)
    story.tells("accepted").begins()
    assert story.decide(1, Cause.NOT_SLURM).action is Action.NEW_STEP
    assert story.tells("cancelled", by="hpcft cancel").decide(1, Cause.NOT_SLURM).action is Action.STOP


def test_a_preempted_job_is_requeued_and_no_budget_is_used() -> None:
    story = Story()
    for _ in range(50):
        story.begins().ends(Ending.PREEMPTED)
    assert story.begins().decide(75, Cause.PREEMPTED).action is Action.REQUEUE


def test_a_job_that_rank_0_has_requeued_is_left_alone() -> None:
    story = Story().begins().tells("stopping", cause="preempted", step=5).tells("requeued", by="rank-0000")
    decision = story.decide(75, Cause.NOT_SLURM)
    assert decision.action is Action.REQUEUE
    assert decision.requeued
    assert decision.ending is Ending.PREEMPTED


def test_a_job_that_slurm_has_requeued_is_left_alone() -> None:
    decision = Story().begins().decide(143, Cause.REQUEUED)
    assert (decision.action, decision.requeued) == (Action.REQUEUE, True)


def test_where_slurm_does_not_requeue_the_run_stops_and_says_how_to_go_on() -> None:
    for cause, may_requeue in ((Cause.PREEMPTED_NO_REQUEUE, True), (Cause.PREEMPTED, False), (Cause.TIME_LIMIT, False)):
        decision = Story().begins().saves(3).decide(75, cause, may_requeue=may_requeue)
        assert decision.action is Action.STOP
        assert "submit it again" in decision.why


def test_when_slurm_cannot_be_asked_nothing_new_is_started() -> None:
    assert Story().begins().decide(137, Cause.UNKNOWN).action is Action.STOP


def test_time_limits_have_a_budget_of_their_own() -> None:
    story = Story()
    for step in (10, 20):
        story.begins().saves(step).ends(Ending.TIME_LIMIT)
    decision = story.begins().saves(30).decide(75, Cause.TIME_LIMIT)
    assert decision.action is Action.STOP
    assert "3 times, and the budget is 2" in decision.why


def test_the_budget_of_time_limits_is_kept_also_when_ranks_requeue_themselves() -> None:
    story = Story()
    for step in (10, 20, 30):
        story.begins().saves(step).tells("stopping", cause="time_limit", step=step).tells("requeued", by="rank-0000")
    assert spent(story.events, BUDGETS, "7") == "the time limit was reached 3 times, and the budget is 2"
    assert spent(story.events, BUDGETS, "8") is None


def test_a_failed_rank_is_named_and_a_new_job_step_starts_here() -> None:
    story = Story().begins().saves(4)
    story.tells("failed", rank=3, node="n2", error="ValueError: x").tells(
        "failed", rank=0, node="n1", error="peer gone"
    )
    decision = story.decide(137, rank_words="rank 0 on n1: Killed")
    assert decision.action is Action.NEW_STEP
    assert decision.why == "rank 3 on n2 failed: ValueError: x (failure 1 of 2)"


def test_a_rank_that_only_lost_its_peer_is_not_blamed_while_srun_names_another() -> None:
    story = Story().begins()
    story.tells("failed", rank=2, node="n2", error="RuntimeError: Connection closed by peer", peer=True)
    assert story.decide(137, rank_words="rank 3 on n2: Killed").why.startswith("rank 3 on n2: Killed")
    assert "rank 2 on n2 failed" in story.decide(137).why


def test_a_rank_that_could_not_speak_is_named_by_srun() -> None:
    assert Story().begins().decide(rank_words="rank 3 on n2: Killed").why.startswith("rank 3 on n2: Killed")


def test_a_rank_that_dies_near_the_time_limit_has_failed_and_the_job_is_requeued() -> None:
    story = Story().begins().saves(4)
    for told in (story, Story().begins().tells("failed", rank=3, node="n2", error="ValueError: bug")):
        decision = told.decide(1, Cause.TIME_LIMIT, rank_words="rank 3 on n2: Killed")
        assert (decision.action, decision.ending) == (Action.REQUEUE, Ending.FAILED)
        assert decision.why.startswith("rank 3 on n2")
        assert "failure 1 of 2" in decision.why


def test_failures_near_the_time_limit_use_the_budget_of_failures() -> None:
    decision = crashes(2).decide(1, Cause.TIME_LIMIT, rank_words="rank 3 on n2: Killed")
    assert (decision.action, decision.ending) == (Action.STOP, Ending.FAILED)


def test_a_bad_node_is_left_out_also_when_it_shows_near_the_time_limit() -> None:
    found = Story().begins().tells("preflight", ok=False, refused="", bad_nodes=["n2"])
    assert found.decide(4, Cause.TIME_LIMIT).exclude == ("n2",)
    assert Story().begins().decide(137, Cause.TIME_LIMIT, lost=("n2",)).exclude == ("n2",)


def test_ranks_that_were_told_of_the_time_limit_or_ended_by_slurm_have_not_failed() -> None:
    told = Story().begins().saves(4).tells("stopping", cause="time_limit", step=5)
    told.tells("failed", rank=0, node="n1", error="SaveFailed: no space")
    assert told.decide(1, Cause.TIME_LIMIT, rank_words="rank 0 on n1: Killed").ending is Ending.TIME_LIMIT
    killed = Story().begins().decide(137, Cause.TIME_LIMIT, rank_words="rank 0 on n1: Killed", ended=True)
    assert killed.ending is Ending.TIME_LIMIT


@pytest.mark.parametrize("words", ["Exited with exit code 70", "Exited with exit code 75", "Terminated"])
def test_ranks_that_came_to_no_step_edge_before_the_time_limit_have_not_failed(words: str) -> None:
    story = Story().begins().tells("failed", rank=0, node="n1", error="ended with exit code 70", code=70)
    story.tells("failed", rank=1, node="n1", error="Connection closed by peer", peer=True)
    decision = story.decide(70, Cause.TIME_LIMIT, rank_words=f"rank 0 on n1: {words}")
    assert (decision.action, decision.ending) == (Action.REQUEUE, Ending.TIME_LIMIT)


def test_a_signal_by_hand_long_ago_does_not_excuse_a_rank_that_dies() -> None:
    story = Story().begins().tells("stopping", cause="by_hand", step=5).tells("failed", rank=0, node="n1", error="bug")
    assert story.decide(1, Cause.TIME_LIMIT).ending is Ending.FAILED


def test_a_cancellation_near_the_time_limit_is_no_failure_and_no_requeue() -> None:
    decision = Story().begins().decide(137, Cause.CANCELLED, rank_words="rank 0 on n1: Killed", ended=True)
    assert (decision.action, decision.ending) == (Action.STOP, Ending.CANCELLED)


def test_failures_without_progress_stop_at_the_budget() -> None:
    assert crashes(1).decide().action is Action.NEW_STEP
    decision = crashes(2).decide()
    assert decision.action is Action.STOP
    assert "failure 3 without progress" in decision.why


def test_a_new_checkpoint_gives_the_failure_budget_back() -> None:
    assert crashes(20, step=1).saves(1000).decide().action is Action.NEW_STEP


def test_attempts_that_save_nothing_new_stop_however_they_end() -> None:
    story = Story().begins().saves(4).ends(Ending.TIME_LIMIT)
    story.begins().saves(4).ends(Ending.FAILED).begins().ends(Ending.TIME_LIMIT)
    decision = story.begins().decide()
    assert decision.action is Action.STOP
    assert "3 attempts in a row ended without a new checkpoint" in decision.why


def test_a_person_who_submits_again_gets_fresh_budgets() -> None:
    story = crashes(2)
    assert story.decide().action is Action.STOP
    story.job = "8"
    assert story.begins().decide().action is Action.NEW_STEP


def test_a_node_that_slurm_finds_down_is_excluded_and_the_job_requeued() -> None:
    decision = Story().begins().saves(4).decide(lost=("n2",))
    assert (decision.action, decision.exclude) == (Action.REQUEUE, ("n2",))


def test_a_node_that_the_preflight_names_is_excluded_and_the_job_requeued() -> None:
    story = Story().begins().tells("preflight", ok=False, refused="", bad_nodes=["n3"])
    decision = story.decide(code=4)
    assert (decision.action, decision.exclude) == (Action.REQUEUE, ("n3",))
    assert "n3" in decision.why


def test_what_no_node_could_mend_stops_at_once_with_its_words() -> None:
    story = Story().begins().tells("preflight", ok=False, refused="the data of this run is not prepared", bad_nodes=[])
    decision = story.decide(code=2)
    assert (decision.action, decision.ending) == (Action.STOP, Ending.REFUSED)
    assert decision.why == "the data of this run is not prepared"


def test_what_a_rank_refuses_stops_at_once_with_its_words() -> None:
    story = Story().begins().saves(4).tells("failed", rank=1, node="n2", error="peer gone", refused=False)
    story.tells("failed", rank=0, node="n1", error="Refusal: no checkpoint of this run is whole", refused=True)
    for cause in (Cause.TEARDOWN, Cause.NOT_SLURM, Cause.PREEMPTED):
        decision = story.decide(2, cause)
        assert (decision.action, decision.ending) == (Action.STOP, Ending.REFUSED)
        assert decision.why == "rank 0 on n1 refused: Refusal: no checkpoint of this run is whole"


def test_a_cancellation_weighs_more_than_a_refusal() -> None:
    story = Story().begins().tells("failed", rank=0, node="n1", error="x", refused=True)
    assert story.decide(2, Cause.CANCELLED).ending is Ending.CANCELLED


def test_ranks_that_stop_unasked_count_as_a_failure() -> None:
    decision = Story().begins().decide(75)
    assert (decision.action, decision.ending) == (Action.NEW_STEP, Ending.FAILED)
    assert "nobody had asked" in decision.why
