"""Who may write into a run: one holder at a time, and the fence that keeps out those who held it before.

After a node drops out of the network its ranks may live on while Slurm has already restarted the job elsewhere,
under the same job id. So a holder is (job, restart, attempt), and whoever commits a checkpoint asks
``still_mine`` first: a rank of an earlier incarnation then finds the lease in other hands and leaves no trace.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcft import disk
from hpcft.errors import refuse
from hpcft.run.ledger import JOB_VARIABLE, attempt_of, job_of
from hpcft.run.paths import RunPaths
from hpcft.slurm.environment import restart_count
from hpcft.slurm.job import job_state
from hpcft.slurm.states import State

LOCAL = "local-"


@dataclass(frozen=True)
class Holder:
    """One incarnation of one job. ``process``: its pid and start time where no Slurm knows it; time: seconds, epoch."""

    job: str
    restart: int
    attempt: int
    node: str
    plan: str
    time: float
    pid: int = 0
    born: str = ""

    @property
    def token(self) -> tuple[str, int, int]:
        """What the fence compares."""
        return self.job, self.restart, self.attempt

    @property
    def local(self) -> bool:
        return self.job.startswith(LOCAL)


def local_job() -> str:
    """A name for a run of this process without Slurm; exported as HPCFT_JOB to its ranks."""
    return f"{LOCAL}{socket.gethostname()}-{os.getpid()}"


def holder(paths: RunPaths) -> Holder | None:
    """Who holds the run; None when nobody does, or the file says nothing that can be read."""
    try:
        return Holder(**json.loads(paths.lease.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def take(paths: RunPaths, environ: Mapping[str, str], plan: str = "") -> Holder:
    """Make this job the holder, taking over from one that is gone or from an earlier incarnation of itself.

    plan: the plan's fingerprint, kept as it was when empty. Raises Refusal while another live job holds the run.
    """
    with _alone(paths):
        before = holder(paths)
        mine = _me(environ, plan or (before.plan if before else ""))
        if before is not None:
            _refuse_if_held(paths, before, mine)
        disk.replace(paths.lease, json.dumps(asdict(mine)))
    return mine


def still_mine(paths: RunPaths, environ: Mapping[str, str]) -> bool:
    """The fence: does the lease name this job, this restart and this attempt?"""
    now = holder(paths)
    return now is not None and now.token == (job_of(environ), restart_count(environ), attempt_of(environ))


def release(paths: RunPaths, environ: Mapping[str, str]) -> None:
    """Give the run back when this incarnation of the job holds it; otherwise nothing is touched."""
    with _alone(paths):
        now = holder(paths)
        if now is not None and (now.job, now.restart) == (job_of(environ), restart_count(environ)):
            paths.lease.unlink(missing_ok=True)


def alive(who: Holder, ask: Callable[[str], State] | None = None) -> bool:
    """Is the holder's job queued or running, or its process there? Raises Refusal where that cannot be found out."""
    if who.local:
        return _process_alive(who)
    state = (ask or job_state)(who.job)
    if state is State.UNKNOWN:
        raise refuse(f"the run is held by job {who.job}, and Slurm cannot be asked whether that job still lives")
    return state.alive


def _refuse_if_held(paths: RunPaths, before: Holder, mine: Holder) -> None:
    if before.job == mine.job:
        if before.restart > mine.restart:
            raise refuse(
                f"job {mine.job} was restarted elsewhere: restart {before.restart} holds the run, "
                f"this is restart {mine.restart}",
                where=str(paths.lease),
            )
        return
    if alive(before):
        kind = f"process {before.pid} on {before.node}" if before.local else f"job {before.job} on {before.node}"
        raise refuse(
            f"the run is held by {kind}, which is still alive",
            where=str(paths.root),
            hint=f"follow it: hpcft status {paths.root}; end it: hpcft cancel {paths.root}",
        )


def _me(environ: Mapping[str, str], plan: str) -> Holder:
    job = job_of(environ)
    if job is None:
        raise refuse("a run can only be held inside a job", where=JOB_VARIABLE, hint="start it with: hpcft submit")
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    pid = os.getpid() if job.startswith(LOCAL) else 0
    return Holder(
        job, restart_count(environ), attempt_of(environ), node, plan, time.time(), pid, _born(pid) if pid else ""
    )


def _process_alive(who: Holder) -> bool:
    if who.node != socket.gethostname():
        raise refuse(
            f"the run is held by process {who.pid} on {who.node}, which cannot be looked at from here",
            hint="go on on that machine, or remove lease.json when nothing runs there",
        )
    return bool(_born(who.pid)) and _born(who.pid) == who.born


def _born(pid: int) -> str:
    """When a process started, in clock ticks since boot, or "": pids are used again, start times are not."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


@contextmanager
def _alone(paths: RunPaths) -> Iterator[None]:
    """One taker at a time, where the file system knows locks; where it does not, the fence still holds."""
    file = os.open(paths.root / ".lease.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
