"""Who may write into a run: one holder at a time, and the fence that keeps out those who held it before.

After a node drops out of the network its ranks may live on while Slurm has already restarted the job elsewhere,
under the same job id. So a holder is (job, restart, attempt), and whoever commits a checkpoint asks
``still_mine`` first: a rank of an earlier incarnation then finds the lease in other hands and leaves no trace. So
does one that outlives its job: a run given back keeps the name of who had it last.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace

from hpcft import disk
from hpcft.alive import born
from hpcft.errors import Problem, Refusal, refuse
from hpcft.run.ledger import JOB_VARIABLE, attempt_of, job_of
from hpcft.run.paths import RunPaths
from hpcft.slurm.commands import pauses
from hpcft.slurm.environment import restart_count
from hpcft.slurm.job import job_state
from hpcft.slurm.states import State

LOCAL = "local-"
READ_SECONDS = 5.0  # for a file server that fails to answer (ESTALE, EIO) where another look helps


class Unanswered(Refusal):
    """Whether somebody holds the run cannot be found out now; asked again later, it may be."""


@dataclass(frozen=True)
class Holder:
    """One incarnation of one job. pid, born: its process and when that started, where no Slurm knows it.

    time: when it took the run, seconds since the epoch; released: it has given it back.
    """

    job: str
    restart: int
    attempt: int
    node: str
    plan: str
    time: float
    pid: int = 0
    born: str = ""
    released: bool = False

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
    """Who holds the run; None when nobody does, or the file says nothing that can be read.

    Raises Unanswered where there is a file that cannot be opened: somebody may hold the run.
    """
    last = _holder_or_last(paths)
    return None if last is None or last.released else last


def _holder_or_last(paths: RunPaths) -> Holder | None:
    """Who holds the run or, where nobody does, had it last. Raises Unanswered."""
    try:
        return _read(paths)
    except OSError as error:
        raise _unanswered(f"who holds the run cannot be read: {error.strerror}", where=str(paths.lease)) from error


def _read(paths: RunPaths) -> Holder | None:
    try:
        found = json.loads(_text(paths))
        return Holder(**{field.name: found[field.name] for field in fields(Holder) if field.name in found})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _text(paths: RunPaths) -> str:
    failed: OSError | None = None
    for _ in pauses(READ_SECONDS, first=0.1):
        try:
            return paths.lease.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except OSError as error:
            failed = error
    assert failed is not None
    raise failed


def take(paths: RunPaths, environ: Mapping[str, str], plan: str = "") -> Holder:
    """Make this job the holder, taking over from one that is gone or from an earlier incarnation of itself.

    plan: the plan's fingerprint, kept as it was when empty. Raises Refusal while another live job holds the run.
    """
    with _alone(paths):
        before = _holder_or_last(paths)
        mine = _me(environ, plan or (before.plan if before else ""))
        if before is not None and before.job == mine.job:
            _refuse_if_restarted(paths, before, mine, float(environ.get("SLURM_JOB_START_TIME") or 0))
        elif before is not None and not before.released:
            _refuse_if_alive(paths, before)
        _write(paths, mine)
    return mine


def still_mine(paths: RunPaths, environ: Mapping[str, str]) -> bool:
    """The fence: is the run held by this job, this restart and this attempt? Raises OSError where it cannot be read."""
    now = _read(paths)
    return now is not None and not now.released and now.token == _token(environ)


def free_or_mine(paths: RunPaths, environ: Mapping[str, str]) -> bool:
    """The same for ranks that may have been started by hand: outside of any job, in a run that nobody holds."""
    last = _read(paths)
    if last is None:
        return not paths.lease.exists()
    return last.released if job_of(environ) is None else still_mine(paths, environ)


def release(paths: RunPaths, environ: Mapping[str, str]) -> None:
    """Give the run back when this incarnation of the job holds it; otherwise nothing is touched.

    Its name stays, so that a rank that lives on is still kept out. Where that cannot be written, on a full disk,
    the run becomes free when the job has ended.
    """
    with suppress(OSError), _alone(paths):
        now = _read(paths)
        if now is not None and not now.released and now.token[:2] == _token(environ)[:2]:
            _write(paths, replace(now, released=True))


def _token(environ: Mapping[str, str]) -> tuple[str | None, int, int]:
    return job_of(environ), restart_count(environ), attempt_of(environ)


def _write(paths: RunPaths, who: Holder) -> None:
    # Releases that do not know the word read a lease with it as nobody's: right for a run that was given back.
    known = {name: value for name, value in asdict(who).items() if name != "released" or value}
    disk.replace(paths.lease, json.dumps(known))


def alive(who: Holder, ask: Callable[[str], State] | None = None) -> bool:
    """Is the holder's job queued or running, or its process there? Raises Refusal where that cannot be found out,
    Unanswered where asking again may help.
    """
    if who.local:
        return _process_alive(who)
    state = (ask or job_state)(who.job)
    if state is State.UNKNOWN:
        raise _unanswered(f"the run is held by job {who.job}, and Slurm cannot be asked whether that job still lives")
    return state.alive


def _unanswered(what: str, where: str = "") -> Unanswered:
    return Unanswered(Problem(what, where, hint="nothing was changed; try again later"))


def _refuse_if_restarted(paths: RunPaths, before: Holder, mine: Holder, began: float) -> None:
    """began: when Slurm started this job, seconds since the epoch. Where the run was given back before that, this is
    another job: a Slurm that was built anew counts from 1 again.
    """
    if before.restart > mine.restart and not (before.released and began > before.time):
        has = "had the run last" if before.released else "holds the run"
        raise refuse(
            f"job {mine.job} was restarted elsewhere: restart {before.restart} {has}, this is restart {mine.restart}",
            where=str(paths.lease),
        )


def _refuse_if_alive(paths: RunPaths, held: Holder) -> None:
    if alive(held):
        kind = f"process {held.pid} on {held.node}" if held.local else f"job {held.job} on {held.node}"
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
        job, restart_count(environ), attempt_of(environ), node, plan, time.time(), pid, born(pid) if pid else ""
    )


def _process_alive(who: Holder) -> bool:
    if who.node != socket.gethostname():
        raise refuse(
            f"the run is held by process {who.pid} on {who.node}, which cannot be looked at from here",
            hint="go on on that machine, or remove lease.json when nothing runs there",
        )
    return bool(born(who.pid)) and born(who.pid) == who.born


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
