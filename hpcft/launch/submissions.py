"""The jobs of one run that Slurm may still have: a run can be handed over twice while neither job has begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hpcft.run import lease
from hpcft.run.ledger import Event, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.job import job_state
from hpcft.slurm.states import State

LIVES = ("accepted", "attempt_began")
SKEW_SECONDS = 900.0  # by which the clocks of nodes and file server may differ

SUBMITTED = "_submission.sh"  # submitit's own ending; before it stands the job's id


def living(paths: RunPaths, ask: Callable[[str], State] | None = None) -> dict[str, State]:
    """Jobs of the run that wait or run, oldest first; also those of which Slurm cannot say, as State.UNKNOWN."""
    states = {job: (ask or job_state)(job) for job in unended(paths)}
    return {job: state for job, state in states.items() if state.alive or state is State.UNKNOWN}


def handed_over(paths: RunPaths) -> list[Path]:
    """The files that say which jobs were handed to Slurm for this run, oldest first; see ``job_in``."""
    # A run without Slurm leaves an empty file under the id of its process, which may be the number of a job.
    files = [file for file in paths.jobs.glob(f"*{SUBMITTED}") if file.stat().st_size]
    return sorted(files, key=lambda file: file.stat().st_mtime)


def job_in(file: Path) -> str:
    """The job that a file of ``handed_over`` is about: 12, or 12_3 for the element of an array."""
    return file.name.removesuffix(SUBMITTED)


def newest_job(events: Sequence[Event], paths: RunPaths) -> str | None:
    """The job that was submitted or began last."""
    submitted = next(reversed(handed_over(paths)), None)
    began = next((event for event in reversed(events) if event["event"] in LIVES), None)
    if submitted is not None and (began is None or _after(submitted, began, events)):
        return job_in(submitted)
    return began["job"] if began else None


def _after(submitted: Path, began: Event, events: Sequence[Event]) -> bool:
    """Whether a job was handed over after another one began, whose node may have a clock that is ahead.

    Within that the later one is the one of which the ledger has no word yet, where the other has ended.
    """
    job, ahead = job_in(submitted), began["time"] - submitted.stat().st_mtime
    if ahead < 0:
        return True
    known = any(event["job"] == job and event["event"] in (*LIVES, "cancelled") for event in events)
    return ahead < SKEW_SECONDS and not known and _ended(events, began["job"])


def unended(paths: RunPaths) -> list[str]:
    """Jobs that were handed to Slurm, or began, and of which the ledger does not know the end; oldest first.

    Those that ended are not asked about: after years Slurm gives their numbers to other jobs.
    """
    events = read_events(paths)
    handed = [job_in(file) for file in handed_over(paths)]
    began = [str(event["job"]) for event in events if event["event"] in LIVES and event["job"]]
    jobs = dict.fromkeys([*handed, *(job for job in began if not job.startswith(lease.LOCAL))])
    return [job for job in jobs if not _ended(events, job)]


def _ended(events: Sequence[Event], job: str) -> bool:
    """Whether the last word on the job's life is that it stopped for good."""
    told = [event for event in events if event["job"] == job and event["event"] in (*LIVES, "attempt_ended")]
    return bool(told) and told[-1].get("decision") in ("stop", "done")
