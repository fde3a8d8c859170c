"""What to do when a job step has ended: a pure function of the ledger, the budgets and what Slurm says.

Nothing is started or requeued after a cancellation; preemptions are free; time limits and failures have budgets
of their own; and a run whose attempts make no progress stops. A rank that dies of itself near the time limit is a
failure; that little time is left only decides where the next attempt is made. Budgets count the attempts of this job
alone, so a run that stopped on one of them gets a fresh one when a person submits it again.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcft.launch.ranks import EXIT_HUNG, EXIT_STOPPED, describe
from hpcft.plan.plan import Budgets
from hpcft.run.lease import LOCAL
from hpcft.run.ledger import Event
from hpcft.slurm.cause import Cause


class Action(enum.Enum):
    """What happens next; the value is the exit code that the batch script reads."""

    DONE = 0
    NEW_STEP = 10
    REQUEUE = 20
    STOP = 30


class Ending(str, enum.Enum):
    """How an attempt ended; kept in the ledger as ``ending``."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    REQUEUED = "requeued"  # by Slurm after a lost node, or by a person
    FAILED = "failed"
    REFUSED = "refused"  # nothing that another try would change
    UNKNOWN = "unknown"


SPENT = frozenset({Ending.FAILED, Ending.TIME_LIMIT})  # endings that must not go on for ever without progress

# Exit codes of ranks that were asked to stop, and srun's words for them. A rank that was asked while a step took longer
# than the time that was left ends itself as hung.
_ASKED = (EXIT_STOPPED, EXIT_HUNG)
TOLD = re.compile(rf"Terminated|exit code ({EXIT_STOPPED}|{EXIT_HUNG}|143)\b")


@dataclass(frozen=True)
class Facts:
    """What is known besides the ledger.

    code: exit code of the job step. attempt, job: the attempt that ended. cause: what Slurm says of this moment,
    NOT_SLURM without Slurm. rank_words: what srun said of the first rank that died. lost: nodes that Slurm finds
    down. may_requeue: the job's requeue flag. ended: it was Slurm that ended the job step, together with the job.
    """

    code: int
    attempt: int
    job: str | None
    cause: Cause
    rank_words: str = ""
    lost: tuple[str, ...] = ()
    may_requeue: bool = True
    ended: bool = False


@dataclass(frozen=True)
class Decision:
    """action, and why in one sentence for people. requeued: it is in the queue already. exclude: bad nodes."""

    action: Action
    ending: Ending
    why: str
    requeued: bool = False
    exclude: tuple[str, ...] = ()


def decide(events: Sequence[Event], budgets: Budgets, facts: Facts) -> Decision:
    """The decision for the attempt that just ended. The order of the questions is the order of their weight."""
    here = [event for event in events if event["attempt"] == facts.attempt]
    if _any(events, "finished"):
        return Decision(Action.DONE, Ending.FINISHED, "the run is finished")
    if (by := _cancelled(events, facts)) is not None:
        return Decision(Action.STOP, Ending.CANCELLED, by)
    if _any(here, "requeued") or facts.cause is Cause.REQUEUED:
        return Decision(Action.REQUEUE, _ending_of_stop(here), "the job is in the queue again", requeued=True)
    if facts.cause is Cause.UNKNOWN:
        return Decision(Action.STOP, Ending.UNKNOWN, "Slurm could not be asked whether this job was cancelled")
    if (refused := _last(here, "preflight")) and refused.get("refused"):
        return Decision(Action.STOP, Ending.REFUSED, str(refused["refused"]))
    if sure := [event for event in here if event["event"] == "failed" and event.get("refused")]:
        return Decision(Action.STOP, Ending.REFUSED, _said(sure[0], "refused"))
    if facts.cause is Cause.PREEMPTED_NO_REQUEUE:
        why = "preempted, and Slurm does not requeue jobs here; submit it again to go on"
        return Decision(Action.STOP, Ending.PREEMPTED, why)
    if facts.cause is Cause.PREEMPTED:
        return _requeue(facts, Ending.PREEMPTED, "preempted")
    if facts.cause is Cause.TIME_LIMIT and not _died(here, facts):
        return _time_limit(events, budgets, facts)
    return _failure(events, here, budgets, facts)


def spent(events: Sequence[Event], budgets: Budgets, job: str | None) -> str | None:
    """Why a requeued job must not begin another attempt, or None: ranks requeue themselves and know no budgets."""
    endings = [(ending, progressed) for _, ending, progressed in _attempts(events, job)]
    if (used := [ending for ending, _ in endings].count(Ending.TIME_LIMIT)) > budgets.time_limits:
        return f"the time limit was reached {used} times, and the budget is {budgets.time_limits}"
    fruitless = list(itertools.takewhile(lambda pair: not pair[1], endings))
    count = sum(ending in SPENT for ending, _ in fruitless)
    if count >= budgets.without_progress:
        return f"{count} attempts in a row ended without a new checkpoint"
    return None


def _cancelled(events: Sequence[Event], facts: Facts) -> str | None:
    told = _last(_of_job(events, facts.job), "cancelled")
    if told is not None:
        return f"cancelled by {told.get('by', 'hpcft cancel')}"
    return "the job was cancelled" if facts.cause is Cause.CANCELLED else None


def _of_job(events: Sequence[Event], job: str | None) -> Sequence[Event]:
    """The job's events. One without Slurm is named after its process, and process ids come again: those since it
    was accepted.
    """
    mine = [event for event in events if event["job"] == job]
    if not (job or "").startswith(LOCAL):
        return mine
    accepted = [n for n, event in enumerate(mine) if event["event"] == "accepted"]
    return mine[accepted[-1] :] if accepted else mine


def _requeue(facts: Facts, ending: Ending, why: str, exclude: tuple[str, ...] = ()) -> Decision:
    if not facts.may_requeue:
        return Decision(Action.STOP, ending, f"{why}, and this job may not be requeued; submit it again to go on")
    return Decision(Action.REQUEUE, ending, why, exclude=exclude)


def _time_limit(events: Sequence[Event], budgets: Budgets, facts: Facts) -> Decision:
    now = [*events, _as_event(facts, Ending.TIME_LIMIT)]
    if (why := spent(now, budgets, facts.job)) is not None:
        return Decision(Action.STOP, Ending.TIME_LIMIT, why)
    return _requeue(facts, Ending.TIME_LIMIT, "the time limit was reached")


def _died(here: Sequence[Event], facts: Facts) -> bool:
    """Was the end of an attempt near the time limit somebody's fault? Slurm says only that the limit is near.

    Not where Slurm ended the ranks, or they had been told of the limit: what fails then, fails for want of time.
    """
    if facts.ended or _ending_of_stop(here) is Ending.TIME_LIMIT:
        return False
    failed = [event for event in here if event["event"] == "failed" and not event.get("peer")]
    named = bool(facts.rank_words) and not TOLD.search(facts.rank_words)
    return named or any(event.get("code") not in _ASKED for event in failed) or bool(_bad_nodes(here, facts))


def _bad_nodes(here: Sequence[Event], facts: Facts) -> tuple[str, ...]:
    found = (_last(here, "preflight") or {}).get("bad_nodes") or ()
    return tuple(dict.fromkeys([*facts.lost, *found]))


def _failure(events: Sequence[Event], here: Sequence[Event], budgets: Budgets, facts: Facts) -> Decision:
    now = [*events, _as_event(facts, Ending.FAILED)]
    what, used = _what_failed(here, facts), _failures_since_progress(now, facts.job)
    if used > budgets.failures:
        why = f"{what}; that is failure {used} without progress, and the budget is {budgets.failures}"
        return Decision(Action.STOP, Ending.FAILED, why)
    if (stuck := spent(now, budgets, facts.job)) is not None:
        return Decision(Action.STOP, Ending.FAILED, f"{what}; {stuck}")
    why = f"{what} (failure {used} of {budgets.failures})"
    if bad := _bad_nodes(here, facts):
        return _requeue(facts, Ending.FAILED, f"{why}; without {', '.join(bad)}", exclude=bad)
    if facts.cause is Cause.TIME_LIMIT:
        return _requeue(facts, Ending.FAILED, f"{why}; the time left is too short for another try here")
    return Decision(Action.NEW_STEP, Ending.FAILED, why)


def _what_failed(here: Sequence[Event], facts: Facts) -> str:
    """The culprit: a rank that says so itself, else whom srun names, else a rank that lost its peer, else the code."""
    failed = [event for event in here if event["event"] == "failed"]
    if culprits := [event for event in failed if not event.get("peer")]:
        return _said(culprits[0])
    if facts.rank_words:
        return facts.rank_words
    if failed:
        return _said(failed[0])
    if (found := _last(here, "preflight")) and found.get("bad_nodes"):
        return f"the preflight found fault with {', '.join(found['bad_nodes'])}"
    if facts.code in (0, EXIT_STOPPED):
        return "the ranks stopped before the end, and nobody had asked them to"
    return f"the job step {describe(facts.code)}"


def _said(failed: Event, what: str = "failed") -> str:
    who = f"rank {failed['rank']} on {failed.get('node')}" if "rank" in failed else f"{failed.get('node')}"
    return f"{who} {what}: {failed.get('error')}"


def _failures_since_progress(events: Sequence[Event], job: str | None) -> int:
    count = 0
    for _, ending, progressed in _attempts(events, job):
        count += ending is Ending.FAILED
        if progressed:
            break
    return count


def _attempts(events: Sequence[Event], job: str | None) -> Iterator[tuple[int, Ending, bool]]:
    """This job's attempts, newest first: number, how it ended, and did it save a later step than all before it."""
    numbers = {event["attempt"] for event in events if event["job"] == job and event["attempt"] > 0}
    for number in sorted(numbers, reverse=True):
        mine = [event for event in events if event["attempt"] == number]
        before = [event for event in events if event["attempt"] < number]
        yield number, _ending(mine), _saved(mine) > _saved(before)


def _as_event(facts: Facts, ending: Ending) -> Event:
    """The attempt that just ended, as the ledger will have it."""
    return {"event": "attempt_ended", "attempt": facts.attempt, "job": facts.job, "ending": ending.value}


def _ending(events: Sequence[Event]) -> Ending:
    told = _last(events, "attempt_ended")
    return Ending(told["ending"]) if told and "ending" in told else _ending_of_stop(events)


def _ending_of_stop(events: Sequence[Event]) -> Ending:
    """How an attempt ended that was killed before it could say so: by what its ranks knew."""
    cause = str((_last(events, "stopping") or {}).get("cause", "")).lower()
    return {"preempted": Ending.PREEMPTED, "time_limit": Ending.TIME_LIMIT}.get(cause, Ending.REQUEUED)


def _saved(events: Sequence[Event]) -> int:
    return max((int(event["step"]) for event in events if event["event"] == "saved"), default=0)


def _last(events: Sequence[Event], name: str) -> Event | None:
    return next((event for event in reversed(events) if event["event"] == name), None)


def _any(events: Sequence[Event], name: str) -> bool:
    return _last(events, name) is not None
