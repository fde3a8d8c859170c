"""Putting the job back into the queue, ending it for good, and asking its ranks to save."""

from __future__ import annotations

from collections.abc import Mapping

from hpcft.slurm.commands import Answer, SlurmAway, SlurmMissing, call, pauses
from hpcft.slurm.environment import own_job_id, restart_count
from hpcft.slurm.job import JobUnknown, show_job


def requeue(environ: Mapping[str, str], seconds: float) -> bool:
    """Requeue this job; True when it is back in the queue, by this call or another. Tries for ``seconds``.

    It checks no cause: the caller has asked ``why_signalled`` first, or a scancel would be undone.
    Slurm ends this job's processes as soon as it has accepted, often the scontrol that asked among them: a call
    that died or timed out is therefore looked up, not reported as a failure.
    """
    job_id = own_job_id(environ)
    if job_id is None:
        return False
    for left in pauses(seconds):
        try:
            answer = call(["scontrol", "requeue", job_id], timeout=max(left, 1.0))
            if answer.rc == 0 or _was_requeued(job_id, environ):
                return True
            if answer.rc > 0:
                return False
        except SlurmMissing:
            return False
        except SlurmAway:
            continue
    return False


def cancel(job_id: str) -> Answer:
    """End a job for good: its requeue flag is taken away first, so that nothing in it can bring it back.

    Raises SlurmAway where the controller does not answer.
    """
    call(["scontrol", "update", f"JobId={job_id}", "Requeue=0"])
    return call(["scancel", job_id])


def signal_ranks(job_id: str, signal_name: str = "USR1") -> Answer:
    """Send a signal to the job's ranks, not to its batch shell. Raises SlurmAway."""
    return call(["scancel", f"--signal={signal_name}", job_id])


def _was_requeued(job_id: str, environ: Mapping[str, str]) -> bool:
    """Restarts is counted up by the requeue itself, before the job starts again."""
    try:
        facts = show_job(job_id)
    except JobUnknown:
        return False
    return facts.restarts > restart_count(environ) or facts.state.waiting
