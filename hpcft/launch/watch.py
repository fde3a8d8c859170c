"""How a run stands, from whoever still knows: Slurm while it does, then the ledger. Nothing needs accounting."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import Refusal, refuse
from hpcft.launch.after import culprit
from hpcft.launch.batchlog import batch_log
from hpcft.launch.decide import Ending
from hpcft.launch.preparation import preparation, waiting
from hpcft.launch.startup import Startup, startup_of
from hpcft.launch.submissions import living, newest_job
from hpcft.plan.plan import Plan
from hpcft.plan.prepared import prepared_facts
from hpcft.plan.steps import total_steps
from hpcft.run import lease
from hpcft.run.folder import is_run
from hpcft.run.ledger import JOB_VARIABLE, Event, Ledger, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm import requeue
from hpcft.slurm.commands import SlurmAway
from hpcft.slurm.job import job_state, job_states
from hpcft.slurm.states import State


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. began, ended: seconds since the epoch; ending: how it ended, "" while it runs; why: in words."""

    number: int
    job: str | None
    restart: int
    nodes: tuple[str, ...]
    began: float
    ended: float | None
    first_step: int | None
    last_saved: int | None
    ending: str
    why: str
    logs: Path
    startup: Startup | None


@dataclass(frozen=True)
class RunStatus:
    """A run. state: finished, cancelled, stopped; cancelling, while a cancelled job still lives; preparing, while
    another job prepares its data; or Slurm's word in small letters (pending, running …), or unknown, and why says why.

    step: the newest that is known of; total: None before the data is prepared. saved: the newest checkpoint's step.
    """

    name: str
    run: Path
    state: str
    job: str | None
    where: str  # slurm | local
    step: int
    total: int | None
    saved: int | None
    attempts: tuple[AttemptStatus, ...]
    why: str
    batch_log: Path | None = None  # of the newest job

    @property
    def alive(self) -> bool:
        return self.state not in (*ENDED, "unknown", "new")


ENDED = ("finished", "cancelled", "stopped")


def status(folder: Path) -> RunStatus:
    """The status of the run in ``folder``. Raises Refusal where there is no run."""
    paths = RunPaths(folder.absolute())
    found = _Read.of(paths)
    if not is_run(folder) and not found.events and found.job is None:
        raise refuse("no run is here", where=str(folder), hint="hpcft list shows the runs of this folder")
    return _settled(found, job_state)


def _settled(found: _Read, ask: Callable[[str], State]) -> RunStatus:
    """The status by what the disk says and Slurm after it; a run that ended between the two may have said how."""
    now = _status(found, ask)
    if now.state not in ("stopped", "cancelled", "unknown"):
        return now
    try:
        again = _Read.of(found.paths)
    except OSError:  # what was read before stands
        return now
    return now if again.events == found.events else _status(again, ask)


@dataclass(frozen=True)
class _Read:
    """What the disk says of a run. job: the newest."""

    paths: RunPaths
    events: Sequence[Event]
    job: str | None

    @classmethod
    def of(cls, paths: RunPaths) -> _Read:
        events = read_events(paths)
        return cls(paths, events, newest_job(events, paths))

    @property
    def slurm_job(self) -> str | None:
        """The job to ask Slurm about, where its answer counts."""
        finished = any(event["event"] == "finished" for event in self.events)
        return None if finished or (self.job or "").startswith(lease.LOCAL) else self.job

    @property
    def slurm_jobs(self) -> list[str]:
        """The same, and the job that it waits for."""
        waits = waiting(self.events, self.slurm_job)
        return [job for job in (self.slurm_job, str(waits["preparation"]) if waits else None) if job]


def _status(found: _Read, ask: Callable[[str], State]) -> RunStatus:
    paths, events, job = found.paths, found.events, found.job
    plan, unread = _plan(paths)
    try:
        state, why = state_of(paths, events, job, ask)
    except Refusal as refusal:
        state, why = "unknown", refusal.problems[0].what
    log = batch_log(paths, events)
    if state == "stopped" and not why and not _has_begun(events, job):
        why = "the job ended before an attempt began" + (f"; its log: {log}" if log else "")
    return RunStatus(
        name=plan.name if plan else paths.root.name,
        run=paths.root,
        state=state,
        job=job,
        where="local" if (job or "").startswith(lease.LOCAL) else "slurm",
        step=max(_steps(events), default=0),
        total=_total(plan, events),
        saved=max((event["step"] for event in events if event["event"] == "saved"), default=None),
        attempts=attempts(paths, events, alive=state not in ENDED),
        why=why or unread,
        batch_log=log,
    )


def runs(folder: Path) -> list[RunStatus]:
    """The runs in ``folder``, newest first; what begins with a dot is a verification's or an array's."""
    there = folder.absolute().iterdir() if folder.is_dir() else ()
    places = [path for path in there if not path.name.startswith(".") and is_run(path)]
    newest = sorted(places, key=_changed, reverse=True)
    read = [_readable(RunPaths(path)) for path in newest]
    # A sweep has a thousand runs, and Slurm is asked once.
    states = job_states({job for run in read if isinstance(run, _Read) for job in run.slurm_jobs})
    ask = functools.partial(_known, states)
    return [_settled(run, ask) if isinstance(run, _Read) else run for run in read]


def _changed(folder: Path) -> float:
    """When something last came to ``folder``; 0 of one that was removed meanwhile, as by a submission that failed."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _known(states: Mapping[str, State], job: str) -> State:
    return states.get(job, State.UNKNOWN)


def _readable(paths: RunPaths) -> _Read | RunStatus:
    """What the disk says of a run; of one that cannot be read, that: it must not hide the others."""
    try:
        return _Read.of(paths)
    except OSError as error:
        why = f"it cannot be read: {error.strerror}"
        return RunStatus(paths.root.name, paths.root, "unknown", None, "slurm", 0, None, None, (), why)


def state_of(
    paths: RunPaths, events: Sequence[Event], job: str | None, ask: Callable[[str], State] | None = None
) -> tuple[str, str]:
    """The state in one word, and why the last attempt ended. The ledger's last word counts before Slurm's."""
    if any(event["event"] == "finished" for event in events):
        return "finished", ""
    mine = [event for event in events if event["job"] == job]
    # The last by its number: attempts of one job may be made on nodes with other clocks.
    ended = max((e for e in mine if e["event"] == "attempt_ended"), key=lambda e: int(e["attempt"]), default=None)
    cancelled = any(event["event"] == "cancelled" for event in mine)
    if ended is not None and ended["decision"] == "stop" and not _begun_since(mine, ended):
        cancelled = cancelled or ended.get("ending") == Ending.CANCELLED.value
        return ("cancelled" if cancelled else "stopped"), str(ended["why"])
    asked = _asked(paths, job, ask or job_state)
    before = None if cancelled or asked == "running" else preparation(paths, events, job, ask)
    if before is not None and before.failed:  # the job that waits for it ends with it, if it has not yet
        return "stopped", f"preparing the data failed in job {before.job}: {before.failed}; its log: {before.log}"
    if before is not None and before.alive:
        return "preparing", f"job {before.job}, {before.state.name.lower()}; its log: {before.log}"
    if cancelled:  # its ranks save before they end, and until then nothing else may hold the run
        return ("cancelled" if asked in (*ENDED, "unknown") else "cancelling"), "cancelled"
    return asked, str(ended["why"]) if ended else ""


def _asked(paths: RunPaths, job: str | None, ask: Callable[[str], State]) -> str:
    if job is None:
        return "new"
    if job.startswith(lease.LOCAL):
        holder = lease.holder(paths)
        return "running" if holder is not None and lease.alive(holder) else "stopped"
    state = ask(job)
    words = {State.UNKNOWN: "unknown", State.FORGOTTEN: "stopped", State.COMPLETED: "stopped"}
    return words.get(state, "stopped" if state.finished and state is not State.CANCELLED else state.name.lower())


def _has_begun(events: Sequence[Event], job: str | None) -> bool:
    return any(event["event"] == "attempt_began" and event["job"] == job for event in events)


def _begun_since(events: Sequence[Event], ended: Event) -> bool:
    return any(e["event"] in ("accepted", "attempt_began") and e["time"] > ended["time"] for e in events)


def attempts(paths: RunPaths, events: Sequence[Event], alive: bool) -> tuple[AttemptStatus, ...]:
    """The attempts table, oldest first."""
    begun = [event for event in events if event["event"] == "attempt_began"]
    return tuple(_attempt(paths, events, began, alive and began is begun[-1]) for began in begun)


def _attempt(paths: RunPaths, events: Sequence[Event], began: Event, alive: bool) -> AttemptStatus:
    number = began["attempt"]
    mine = [event for event in events if event["attempt"] == number]
    last = {event["event"]: event for event in mine}
    ended, stopping, failed = last.get("attempt_ended"), last.get("stopping"), last.get("failed")
    why = str(ended["why"]) if ended else ""
    if not why and failed:
        why = f"rank {failed.get('rank')} on {failed.get('node')}: {failed.get('error')}"
    why = why or culprit(paths.attempt(number) / "srun.log") or (str(stopping["cause"]) if stopping else "")
    word = Ending.FINISHED.value if "finished" in last else "" if alive else "ended without a word"
    ending = str(ended.get("ending", "")) if ended else word
    return AttemptStatus(
        number=number,
        job=began["job"],
        restart=began["restart"],
        nodes=tuple(began.get("nodes", ())),
        began=began["time"],
        ended=ended["time"] if ended else None if alive else mine[-1]["time"],
        first_step=last["started"].get("step") if "started" in last else None,
        last_saved=last["saved"]["step"] if "saved" in last else None,
        ending=ending,
        why=why,
        logs=paths.attempt(number),
        startup=startup_of(events, number, time.time() if alive and not ended else None),
    )


def cancel(folder: Path, by: str = "hpcft cancel") -> str:
    """End the run for good, every job of it, and say how. One that has ended is left as it is.

    Raises Refusal, or SlurmAway: the run is marked as cancelled then, and asked again this goes on.
    """
    paths = RunPaths(folder.absolute())
    now = status(folder)
    here = now.alive and now.where == "local"
    jobs = [now.job] if here and now.job else [] if now.state == "finished" else list(living(paths))
    events = read_events(paths)
    asked = jobs or ([now.job] if now.job and now.state != "finished" else [])
    before = [made for job in asked if (made := preparation(paths, events, job)) and made.alive]
    if not jobs and not before and now.state == "unknown":
        raise refuse(now.why, where=str(paths.root), hint="cancel it on the machine where it runs")
    if not jobs and not before:
        return f"run {now.name} is {now.state}; nothing to cancel"
    # Written first: whoever decides what comes next sees it, whatever happens to the signal.
    unwritten = _mark(paths, jobs, by)
    try:
        said = _cancel_local(paths, now) if here else _cancel_jobs(jobs, [made.job for made in before])
    except SlurmAway as error:
        if unwritten:
            raise refuse(f"Slurm does not answer: {error}; {unwritten}", hint="try again: nothing is marked") from error
        raise
    return f"{said}; {unwritten}" if unwritten else said


def _mark(paths: RunPaths, jobs: Sequence[str], by: str) -> str:
    """Tell the ledger that these jobs are cancelled; "" or why it could not be told. On a full disk jobs end too."""
    try:
        for job in jobs:
            Ledger(paths, "cancel", {JOB_VARIABLE: job}).write("cancelled", by=by)
    except OSError as error:
        return f"the ledger cannot be told: {error.strerror}"
    return ""


def _cancel_jobs(jobs: Sequence[str], preparing: Sequence[str]) -> str:
    for job in (*jobs, *preparing):  # first who waits, so that nothing starts it
        answer = requeue.cancel(job)
        if answer.rc != 0:
            raise refuse(f"scancel: {answer.err.strip()}", where=f"job {job}")
    if preparing:
        return f"cancelled job {', '.join((*jobs, *preparing))}; what is prepared by now is kept"
    return f"cancelled job {', '.join(jobs)}; its ranks may save before they end"


def _cancel_local(paths: RunPaths, now: RunStatus) -> str:
    holder = lease.holder(paths)
    if holder is None or not lease.alive(holder):
        return f"run {now.name} has ended meanwhile"
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return f"run {now.name} has ended meanwhile"
    return f"asked process {holder.pid} to stop; its ranks save before they end"


def wait_until_ended(folder: Path, seconds: float) -> RunStatus:
    """The status once the run has ended, or after ``seconds``."""
    end = time.monotonic() + seconds
    while (now := status(folder)).alive and time.monotonic() < end:
        time.sleep(0.5)
    return now


def _plan(paths: RunPaths) -> tuple[Plan | None, str]:
    """The run's plan, or why it cannot be read: another release's, say. How the run stands is known without it."""
    for file in (paths.plan, paths.handed_over):
        try:
            if file.exists() and file.stat().st_size:
                return Plan.from_json(file.read_text(encoding="utf-8"), str(file)), ""
        except (OSError, UnicodeDecodeError) as error:
            return None, f"{file.name} cannot be read: {error}"
        except Refusal as refusal:
            return None, f"{file.name}: {refusal.problems[0].what}"
    return None, ""


def _total(plan: Plan | None, events: Sequence[Event]) -> int | None:
    """Optimizer steps of the whole run, where max_steps or the prepared data tell."""
    if plan is None or plan.optim.max_steps > 0:
        return plan.optim.max_steps if plan else None
    store = next((event.get("store") for event in reversed(events) if event["event"] == "accepted"), None)
    facts = prepared_facts(Path(store), plan.data) if store else None
    return total_steps(plan.optim, facts.windows, plan.batch.global_windows) if facts else None


def _steps(events: Sequence[Event]) -> list[int]:
    return [int(event["step"]) for event in events if isinstance(event.get("step"), int)]


__all__ = ["AttemptStatus", "RunStatus", "SlurmAway", "cancel", "runs", "status", "wait_until_ended"]
