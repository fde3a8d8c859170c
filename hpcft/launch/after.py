"""When a job step has ended: ask ledger and Slurm, decide, requeue if that is the decision, and say why.

Exit code 0: done · 10: start a new job step in this allocation · 20: requeued, leave quietly · 30: stop.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hpcft.errors import LONGEST, printable
from hpcft.launch.begin import allocated_nodes
from hpcft.launch.decide import TOLD, Action, Decision, Ending, Facts, decide
from hpcft.launch.entry import run, say
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.folder import read_plan
from hpcft.run.ledger import Event, Ledger, attempt_of, job_of, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.cause import Cause, why_signalled
from hpcft.slurm.commands import SlurmAway, call
from hpcft.slurm.environment import own_job_id
from hpcft.slurm.job import JobFacts, JobUnknown, show_job
from hpcft.slurm.nodes import expand_hostlist, nodes
from hpcft.slurm.requeue import requeue
from hpcft.slurm.states import State

# While the controller is away nobody else can get these nodes, and giving up would end the run: asked until killed.
PATIENCE_SECONDS = float("inf")
# srun: error: n2: task 3: Killed   ·   srun: error: n[1-2]: tasks 0-1: Exited with exit code 1
_SRUN = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)")


def after(plan: Plan, paths: RunPaths, environ: Mapping[str, str], code: int, stopped: bool = False) -> Decision:
    """Decide on the attempt that ended with ``code``, do it, and write it into the ledger.

    stopped: a person has stopped a run without Slurm, whether the ledger could be told or not.
    """
    facts = facts_of(plan, paths, environ, code)
    decision = decide(read_events(paths), plan.budgets, replace(facts, cause=Cause.CANCELLED) if stopped else facts)
    ledger = Ledger(paths, "batch", environ)
    if decision.action is Action.REQUEUE and not decision.requeued:
        decision = _requeued(decision, plan, ledger, environ)
    try:
        ledger.write(
            "attempt_ended",
            rc=code,
            decision=decision.action.name.lower(),
            ending=decision.ending.value,
            why=decision.why,
        )
    except OSError as error:
        decision = _unwritten(decision, error)
    if decision.action in (Action.DONE, Action.STOP):
        lease.release(paths, environ)
    return decision


def facts_of(plan: Plan, paths: RunPaths, environ: Mapping[str, str], code: int) -> Facts:
    """Everything ``decide`` wants to know. Slurm is not asked about a run that says it is finished or requeued."""
    attempt, job = attempt_of(environ), job_of(environ)
    log = paths.attempt(attempt) / "srun.log"
    here = [event["event"] for event in read_events(paths) if event["attempt"] == attempt]
    cause = Cause.NOT_SLURM
    if own_job_id(environ) and "finished" not in here and "requeued" not in here:
        cause = why_signalled(environ, "TERM", plan.resources.signal_lead, PATIENCE_SECONDS)
    settled = cause in (Cause.NOT_SLURM, Cause.CANCELLED, Cause.REQUEUED, Cause.UNKNOWN)
    now = None if settled else _job(environ)
    return Facts(
        code,
        attempt,
        job,
        cause,
        culprit(log),
        () if settled else lost_nodes(environ, log),
        True if now is None else now.requeue,
        now is not None and now.state not in (State.RUNNING, State.SUSPENDED),
    )


def culprit(log: Path) -> str:
    """The rank that srun's own words blame, as a sentence; "" where they report none."""
    text = _text(log)
    # Peers that were told to end are reported too, as Terminated, 75 or 70; they are named only when nobody else is.
    # A peer that lost its connection may be reported before the rank that a signal took from it.
    found = list(_SRUN.finditer(text))
    deaths = [m for m in found if not TOLD.search(m["what"])] or found
    deaths = [m for m in deaths if not m["what"].startswith("Exited")] or deaths
    if not deaths:
        return ""
    tasks = deaths[0]["tasks"]
    return f"{'ranks' if re.search('[,-]', tasks) else 'rank'} {tasks} on {deaths[0]['node']}: {deaths[0]['what']}"


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def lost_nodes(environ: Mapping[str, str], log: Path) -> tuple[str, ...]:
    """Nodes of this allocation that srun could not reach, or that Slurm finds down or silent (a star in the state)."""
    unreached = re.findall(r"(?:failed on node|Node failure on) ([^\s:]+)", _text(log))
    try:
        known = nodes()
    except SlurmAway:
        known = {}
    states = {name: known[name].state.upper() for name in allocated_nodes(environ) if name in known}
    down = [name for name, state in states.items() if re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", state)]
    return tuple(dict.fromkeys([*unreached, *down]))


def _job(environ: Mapping[str, str]) -> JobFacts | None:
    """The job as it is now; None where Slurm cannot say: whether it may be requeued, the call itself will tell."""
    try:
        return show_job(own_job_id(environ) or "")
    except (SlurmAway, JobUnknown):
        return None


def exclude(environ: Mapping[str, str], bad: tuple[str, ...]) -> bool:
    """Keep the requeued job off ``bad`` nodes, beside those it was kept off before. Slurm takes this once it waits."""
    job_id = own_job_id(environ) or ""
    for _ in range(20):
        try:
            before = expand_hostlist(show_job(job_id).excluded or "")
            names = ",".join(dict.fromkeys([*before, *bad]))
            if call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}"]).rc == 0:
                return True
        except (SlurmAway, JobUnknown):
            pass
        time.sleep(0.5)
    return False


def _requeued(decision: Decision, plan: Plan, ledger: Ledger, environ: Mapping[str, str]) -> Decision:
    """Put the job back; once Slurm accepts, this process has KillWait seconds left to live.

    Slurm is asked once more before: a requeue would bring back a job that was cancelled since the decision.
    """
    if why_signalled(environ, "TERM", plan.resources.signal_lead, PATIENCE_SECONDS) is Cause.CANCELLED:
        return Decision(Action.STOP, Ending.CANCELLED, "the job was cancelled")
    if not requeue(environ, PATIENCE_SECONDS):
        why = f"{decision.why}, but Slurm did not requeue the job; submit it again to go on"
        return Decision(Action.STOP, decision.ending, why)
    with suppress(OSError):
        ledger.write("requeued", by="batch")
    if decision.exclude and not exclude(environ, decision.exclude):
        say(f"could not keep the next attempt off {', '.join(decision.exclude)}")
    return decision


def _unwritten(decision: Decision, error: OSError) -> Decision:
    """What the ledger was not told no budget counts: nothing is started again here."""
    why = f"{decision.why}; and the ledger cannot be written: {error.strerror}"
    return replace(decision, action=Action.STOP if decision.action is Action.NEW_STEP else decision.action, why=why)


def report(plan: Plan, paths: RunPaths, events: list[Event], decision: Decision) -> None:
    """The last words of an attempt in the batch log."""
    words = {
        Action.DONE: "done",
        Action.NEW_STEP: "starting again in this allocation",
        Action.REQUEUE: "requeued",
        Action.STOP: "stopped",
    }
    saved = max((event["step"] for event in events if event["event"] == "saved"), default=None)
    say(f"{words[decision.action]}: {printable(decision.why, LONGEST)}")
    if decision.action is Action.STOP and decision.ending is not Ending.CANCELLED:
        newest = "none" if saved is None else f"step {saved}"
        say(f"newest checkpoint: {newest}; submitted again, the run goes on there")


def main() -> int:
    # Slurm's TERM reaches this process too, and nobody but it decides whether the job comes back.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    paths = RunPaths.from_environment()
    plan = read_plan(paths)
    decision = after(plan, paths, os.environ, int(sys.argv[1]))
    report(plan, paths, read_events(paths), decision)
    return decision.action.value


if __name__ == "__main__":
    sys.exit(run(main))
