"""The job of an sbatch whose answer was lost: a busy controller takes a job after the client has given up waiting.

It has the script's name and this folder for its own, and was not there before. One such job is ours; of several nobody
can say which.
"""

from __future__ import annotations

import os
import re

from hpcft.errors import refuse
from hpcft.slurm.commands import SlurmAway, away, call, pauses

PATIENCE_SECONDS = 30.0  # a job may come into the queue later than its client gave up
INTERRUPTED_SECONDS = 2.0  # the same, while somebody waits for Ctrl-C to end the command


def alike(script: str) -> frozenset[str] | None:
    """My jobs that have the name of ``script`` and this folder, arrays as one; None where nobody can say."""
    name = _name(script)
    if not name:
        return None
    # %Z last: a folder's name may hold anything.
    args = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--name={name}", "--format=%F %Z"]
    try:
        answer = call(args)
    except SlurmAway:
        return None
    if answer.rc != 0:
        return None
    rows = [line.strip().partition(" ") for line in answer.out.splitlines()]
    return frozenset(job for job, _, folder in rows if folder == os.getcwd())


def lost(words: str) -> bool:
    """Do sbatch's words leave open whether the job was taken?"""
    return away(words) or "said no id" in words


def adopt(script: str, before: frozenset[str] | None, words: str) -> str:
    """The job that came since ``before``. Raises Refusal, naming what was found, where it is not exactly one."""
    found: frozenset[str] | None = frozenset()
    for _ in pauses(PATIENCE_SECONDS if before is not None else 0):
        now = alike(script)
        found = None if now is None or before is None else now - before
        if found:
            break
    if found is not None and len(found) == 1:
        return next(iter(found))
    name = _name(script) or "of your own"
    look = f"squeue --me --name={name}"
    if found is None:
        raise refuse(
            f"sbatch: {words}; whether the job was taken cannot be found out", hint=f"before another try: {look}"
        )
    if not found:
        raise refuse(f"sbatch: {words}; no job {name} of this folder has come", hint=f"before another try: {look}")
    jobs = sorted(found, key=int)
    raise refuse(
        f"sbatch: {words}; {len(jobs)} jobs {name} of this folder have come since, and one may be this one",
        value=", ".join(jobs),
        hint=f"look at them: {look}; end what is not wanted: scancel {' '.join(jobs)}",
    )


def came(script: str, before: frozenset[str] | None) -> str | None:
    """The one job that came since ``before``, of a submission that was interrupted; None where nobody can say."""
    for _ in pauses(INTERRUPTED_SECONDS if before is not None else 0):
        if found := (alike(script) or frozenset()) - (before or frozenset()):
            return next(iter(found)) if before is not None and len(found) == 1 else None
    return None


def _name(script: str) -> str:
    found = re.findall(r"^#SBATCH --job-name=(\S+)", script, re.MULTILINE)
    return str(found[-1]) if found else ""
