"""The log of a job's batch script: all that is left of a job that died before its first attempt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hpcft.launch.submissions import SUBMITTED, newest_job
from hpcft.run.lease import LOCAL
from hpcft.run.ledger import JOB_VARIABLE, Event, Ledger
from hpcft.run.paths import RunPaths
from hpcft.slurm.commands import SlurmAway
from hpcft.slurm.job import JobUnknown, show_job

KEY = "batch_log"
NOTE = "# batch log: "  # in the file that says which element of an array is the run


def own() -> str | None:
    """Where the words of this process go, in a job: its batch log; None where that is no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return None
    return path if os.path.isfile(path) else None


def tell(paths: RunPaths, job: str) -> None:
    """Write down where the batch script of a job that was just submitted will write; Slurm knows."""
    # The job is in the queue: what cannot be asked or written now is no reason to call the submission failed.
    with suppress(SlurmAway, JobUnknown, OSError):
        Ledger(paths, "submit", {JOB_VARIABLE: job}).write("submitted", **{KEY: show_job(job).stdout})


def batch_log(paths: RunPaths, events: Sequence[Event]) -> Path | None:
    """The batch log of the run's newest job; None where nobody has said."""
    job = newest_job(events, paths)
    if job is None or job.startswith(LOCAL):
        local = sorted(paths.jobs.glob("*_0_log.out"), key=lambda file: file.stat().st_mtime)
        return local[-1] if local else None
    told = [event[KEY] for event in events if event["job"] == job and event.get(KEY) and event["event"] in _TELL]
    return Path(told[-1]) if told else _noted(paths.jobs / f"{job}{SUBMITTED}")


_TELL = ("submitted", "accepted")


def _noted(file: Path) -> Path | None:
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(NOTE):
                return Path(line.removeprefix(NOTE))
    return None
