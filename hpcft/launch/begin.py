"""A new attempt: its number, the folder of its logs, and where its ranks meet.

Prints ``ATTEMPT MASTER_ADDR MASTER_PORT LOGS`` on one line for the batch shell to read.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import refuse
from hpcft.launch.decide import spent
from hpcft.launch.entry import read_plan, run
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.ledger import ATTEMPT_VARIABLE, Ledger, job_of, read_events, restart_of
from hpcft.run.paths import RunPaths
from hpcft.slurm.nodes import expand_hostlist, free_port, node_address, port_for


@dataclass(frozen=True)
class Attempt:
    """number: from 1. address, port: where the ranks meet. logs: an existing folder."""

    number: int
    address: str
    port: int
    logs: Path

    def line(self) -> str:
        return f"{self.number} {self.address} {self.port} {self.logs}"


def begin(plan: Plan, paths: RunPaths, environ: Mapping[str, str]) -> Attempt:
    """Open the next attempt of the run in ledger and lease. Raises Refusal where another incarnation holds
    the run or a budget is used up.
    """
    events = read_events(paths)
    if (why := spent(events, plan.budgets, job_of(environ))) is not None:
        lease.release(paths, environ)
        raise refuse(
            f"no further attempt: {why}", where=str(paths.root), hint="look at the logs; submit again to go on"
        )
    number = 1 + max((event["attempt"] for event in events), default=0)
    environ = {**environ, ATTEMPT_VARIABLE: str(number)}
    lease.take(paths, environ, plan.fingerprint)
    nodes = allocated_nodes(environ)
    address = node_address(nodes[0]) if "SLURM_JOB_NODELIST" in environ else "127.0.0.1"
    port = free_port(port_for(job_of(environ) or "", restart_of(environ), number))
    logs = paths.attempt(number)
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    Ledger(paths, "batch", environ).write(
        "attempt_began",
        nodes=nodes,
        plan=plan.fingerprint,
        launcher=plan.resources.launcher,
        master=f"{address}:{port}",
    )
    return Attempt(number, address, port, logs)


def allocated_nodes(environ: Mapping[str, str]) -> list[str]:
    """The nodes of the allocation in Slurm's order, or this machine where there is no Slurm."""
    return expand_hostlist(environ.get("SLURM_JOB_NODELIST", "")) or [socket.gethostname()]


def main() -> int:
    paths = RunPaths.from_environment()
    print(begin(read_plan(paths), paths, os.environ).line())
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
