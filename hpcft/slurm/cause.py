"""Why was this job signalled? A preemption and a scancel send the same TERM; only the first wants a requeue."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping

from hpcft.slurm.commands import SlurmAway, SlurmMissing, pauses
from hpcft.slurm.environment import own_job_id, restart_count
from hpcft.slurm.job import JobFacts, JobUnknown, show_job
from hpcft.slurm.states import State

# Slurm polls end times every 30 s and may send the warning signal up to 60 s early.
EARLY_SECONDS = 90


class Cause(enum.Enum):
    """Why a signal came; the value is the sentence for people."""

    PREEMPTED = "the job is being preempted"
    TIME_LIMIT = "the job's time is running out"
    CANCELLED = "the job was cancelled"
    REQUEUED = "the job was requeued already"
    PREEMPTED_NO_REQUEUE = "the job is being preempted and Slurm will not requeue it"
    TEARDOWN = "the job step is being ended because a rank of it died"
    BY_HAND = "somebody sent the signal by hand"
    NOT_SLURM = "the signal did not come from Slurm"
    UNKNOWN = "Slurm could not be asked why"

    @property
    def saves(self) -> bool:
        """A checkpoint is worth writing. In a teardown a peer is dead and the save would wait for it."""
        return self is not Cause.TEARDOWN

    @property
    def requeues(self) -> bool:
        """The job should be requeued by us. Never after a scancel, nor when the cause is not known: it might be one."""
        return self in (Cause.PREEMPTED, Cause.TIME_LIMIT)

    @property
    def goes_on(self) -> bool:
        """Training continues after the save."""
        return self is Cause.BY_HAND


def classify(facts: JobFacts, signal_name: str, restart_count: int, lead_seconds: float, now: float) -> Cause:
    """The cause of a signal, from the job's facts at that moment.

    signal_name: TERM or USR2. restart_count: SLURM_RESTART_COUNT of this process. lead_seconds: how long before
    the end the warning was asked for. now: seconds since the epoch.
    """
    if facts.restarts > restart_count:
        return Cause.REQUEUED
    # A time from before this start belongs to an earlier attempt.
    preempted = facts.preempt_time is not None and facts.preempt_time >= (facts.start_time or 0)
    if facts.state in (State.RUNNING, State.SUSPENDED):
        if preempted:
            return Cause.PREEMPTED
        if facts.end_time is not None and facts.end_time - now <= lead_seconds + EARLY_SECONDS:
            return Cause.TIME_LIMIT
        return Cause.TEARDOWN if signal_name.removeprefix("SIG") == "TERM" else Cause.BY_HAND
    return _when_ending(facts, preempted)


def _when_ending(facts: JobFacts, preempted: bool) -> Cause:
    if facts.reason == "TimeLimit" or facts.state in (State.TIMEOUT, State.DEADLINE):
        return Cause.TIME_LIMIT
    if preempted or facts.state is State.PREEMPTED:
        return Cause.PREEMPTED_NO_REQUEUE
    if facts.state is State.CANCELLED or (facts.state is State.COMPLETING and facts.reason is None):
        return Cause.CANCELLED
    return Cause.UNKNOWN


def why_signalled(environ: Mapping[str, str], signal_name: str, lead_seconds: float, seconds: float) -> Cause:
    """Ask Slurm why this job was signalled, again and again for ``seconds`` while the controller is away."""
    job_id = own_job_id(environ)
    if job_id is None:
        return Cause.NOT_SLURM
    for left in pauses(seconds):
        try:
            facts = show_job(job_id, timeout=max(left, 1.0))
        except (SlurmMissing, JobUnknown):
            return Cause.UNKNOWN
        except SlurmAway:
            continue
        return classify(facts, signal_name, restart_count(environ), lead_seconds, time.time())
    return Cause.UNKNOWN
