"""A new attempt: its number, the folder of its logs, and where its ranks meet.

Prints ``ATTEMPT MASTER_ADDR MASTER_PORT LOGS`` on one line for the batch shell to read. Exit code 0: start the ranks;
5: the time limit is too near, ask ``after`` at once; 2: refused.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import refuse
from hpcft.launch.decide import spent
from hpcft.launch.entry import run
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.folder import read_plan
from hpcft.run.ledger import ATTEMPT_VARIABLE, Event, Ledger, job_of, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.cause import EARLY_SECONDS
from hpcft.slurm.commands import SlurmAway
from hpcft.slurm.environment import own_job_id, restart_count
from hpcft.slurm.job import JobUnknown, show_job
from hpcft.slurm.nodes import expand_hostlist, free_port, node_address, port_for

EXIT_LATE = 5


@dataclass(frozen=True)
class Attempt:
    """number: from 1. address, port: where the ranks meet. logs: an existing folder."""

    number: int
    address: str
    port: int
    logs: Path

    def line(self) -> str:
        return f"{self.number} {self.address} {self.port} {self.logs}"


def begin(plan: Plan, paths: RunPaths, environ: Mapping[str, str], job_began: float | None = None) -> Attempt:
    """Open the next attempt of the run in ledger and lease. job_began: when Slurm started the job, for the ledger.

    Raises Refusal where another incarnation holds the run, the job was cancelled, or a budget is used up.
    """
    events = read_events(paths)
    if (why := over(events, plan, job_of(environ))) is not None:
        lease.release(paths, environ)
        raise refuse(
            f"no further attempt: {why}", where=str(paths.root), hint="look at the logs; submit again to go on"
        )
    number = 1 + max((event["attempt"] for event in events), default=0)
    environ = {**environ, ATTEMPT_VARIABLE: str(number)}
    lease.take(paths, environ, plan.fingerprint)
    nodes = allocated_nodes(environ)
    address = node_address(nodes[0]) if "SLURM_JOB_NODELIST" in environ else "127.0.0.1"
    port = free_port(port_for(job_of(environ) or "", restart_count(environ), number, str(paths.root)))
    logs = paths.attempt(number)
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    Ledger(paths, "batch", environ).write(
        "attempt_began",
        nodes=nodes,
        plan=plan.fingerprint,
        launcher=plan.resources.launcher,
        master=f"{address}:{port}",
        job_began=job_began,
    )
    return Attempt(number, address, port, logs)


def over(events: Sequence[Event], plan: Plan, job: str | None) -> str | None:
    """Why this job begins no further attempt, or None.

    A cancellation that did not reach Slurm is in the ledger alone, and Slurm brings a preempted job back by itself.
    """
    # A run without Slurm is brought back by nobody, and its name may come again: it is made of a process id.
    mine = [] if (job or "").startswith(lease.LOCAL) else [event for event in events if event["job"] == job]
    if told := next((event for event in mine if event["event"] == "cancelled"), None):
        return f"cancelled by {told.get('by', 'hpcft cancel')}"
    return spent(events, plan.budgets, job)


def late(plan: Plan, began: float | None, end: float | None) -> bool:
    """May Slurm's warning before the job's end have been? Ranks that start after it hear of the end only by KILL.

    It may come early. But in a job that is hardly longer than that, ranks would never start.
    """
    if end is None:
        return False
    lead = plan.resources.signal_lead
    half = (end - began) / 2 if began is not None else math.inf
    return end - time.time() < max(lead, min(lead + EARLY_SECONDS, half))


def job_times(environ: Mapping[str, str]) -> tuple[float | None, float | None]:
    """When Slurm started this job and when it will end it; None where it cannot say."""
    job = own_job_id(environ)
    try:
        facts = show_job(job) if job else None
    except (SlurmAway, JobUnknown):
        facts = None
    return (facts.start_time, facts.end_time) if facts else (None, None)


def allocated_nodes(environ: Mapping[str, str]) -> list[str]:
    """The nodes of the allocation in Slurm's order, or this machine where there is no Slurm."""
    return expand_hostlist(environ.get("SLURM_JOB_NODELIST", "")) or [socket.gethostname()]


def main() -> int:
    paths = RunPaths.from_environment()
    plan = read_plan(paths)
    began, end = job_times(os.environ)
    print(begin(plan, paths, os.environ, began).line())
    return EXIT_LATE if late(plan, began, end) else 0


if __name__ == "__main__":
    sys.exit(run(main))
