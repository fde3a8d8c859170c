"""The ranks of one node: started with torchrun's variables, watched, and ended together.

One task per node runs this (launcher ``torchrun``), and so does a run without Slurm. Unlike torchrun it passes
TERM, USR1 and USR2 on to the ranks, gives each a log of its own, and names the rank that died first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType

from hpcft.launch.entry import run, say
from hpcft.plan.plan import Plan
from hpcft.run.folder import read_plan
from hpcft.run.ledger import Ledger, attempt_of
from hpcft.run.paths import RunPaths

EXIT_STOPPED = 75  # a rank stopped on purpose, after a save
EXIT_HUNG = 70  # a rank that was asked to stop came to no step edge
GRACE_SECONDS = 30  # between TERM and KILL for the peers of a rank that died
LATE_SECONDS = 60  # how long the others may go on after one has ended well
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.05

COMMAND = (sys.executable, "-u", "-m", "hpcft.train.main")
VERIFY = (*COMMAND[:-1], "hpcft.train.verify")


@dataclass
class Rank:
    """One started rank."""

    rank: int
    process: subprocess.Popen[bytes]

    def code(self) -> int | None:
        """Its exit code as a shell has it (128 + signal), None while it runs."""
        found = self.process.poll()
        return found if found is None or found >= 0 else 128 - found

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def variables(plan: Plan, node: int, local_rank: int) -> dict[str, str]:
    """torchrun's variables for one rank; MASTER_ADDR and MASTER_PORT are in the environment already."""
    layout = plan.layout
    return {
        "RANK": str(node * layout.ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_WORLD_SIZE": str(layout.ranks_per_node),
        "GROUP_RANK": str(node),
    }


def start(
    plan: Plan, paths: RunPaths, environ: Mapping[str, str], node: int, command: Sequence[str] = COMMAND
) -> list[Rank]:
    """Start this node's ranks. Every rank sees all devices of the node, as the user or Slurm left them."""
    ranks = []
    for local_rank in range(plan.layout.ranks_per_node):
        own = variables(plan, node, local_rank)
        log = paths.rank_log(attempt_of(environ), int(own["RANK"]))
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                command,
                env={**environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_die_with, os.getpid()),
            )
        finally:
            os.close(file)
        ranks.append(Rank(int(own["RANK"]), process))
    return ranks


def watch(ranks: Sequence[Rank], died: Callable[[Rank, int], None]) -> int:
    """Wait for all ranks and return one exit code for them.

    0: all finished; 75: all stopped on purpose; else the code of the first that failed, for which ``died`` is
    called once. Its peers get TERM, and KILL after 30 seconds; so do ranks that outlive a finished one by 60.
    """
    culprit: int | None = None
    kill_at = late_at = float("inf")
    while True:
        codes = {rank.rank: rank.code() for rank in ranks}
        running = [rank for rank in ranks if codes[rank.rank] is None]
        failed = next((rank for rank in ranks if codes[rank.rank] not in (None, 0, EXIT_STOPPED)), None)
        now = time.monotonic()
        if culprit is None and failed is not None:
            culprit = codes[failed.rank]
            died(failed, culprit or 1)
        if not running:
            return culprit if culprit is not None else max(code or 0 for code in codes.values())
        if len(running) < len(ranks) and late_at == float("inf"):
            late_at = now + LATE_SECONDS
        if kill_at == float("inf") and (culprit is not None or now >= late_at):
            culprit = culprit if culprit is not None else 128 + signal.SIGTERM
            kill_at = now + GRACE_SECONDS
            _send(running, signal.SIGTERM)
        if now >= kill_at:
            _send(running, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def forward_signals(ranks: Sequence[Rank]) -> None:
    """From now on TERM, USR1 and USR2 to this process go to its ranks, and do nothing else here."""

    def forward(number: int, _: FrameType | None) -> None:
        _send(ranks, number)

    for number in FORWARDED:
        signal.signal(number, forward)


def record_death(paths: RunPaths, environ: Mapping[str, str], node: str) -> Callable[[Rank, int], None]:
    """What ``watch`` calls: says which rank died, of what, and where its log is; here and in the ledger."""

    def died(rank: Rank, code: int) -> None:
        log = paths.rank_log(attempt_of(environ), rank.rank)
        say(f"rank {rank.rank} on {node} {describe(code)}; its log: {log}")
        with suppress(OSError):  # what ended the rank may be a full disk; its peers have to be told to end all the same
            Ledger(paths, f"node-{node}", environ).write(
                "failed", rank=rank.rank, node=node, error=describe(code), where=str(log), code=code
            )

    return died


def describe(code: int) -> str:
    """An exit code in words: 137 is ``was killed by SIGKILL``."""
    if code > 128:
        try:
            return f"was killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"ended with exit code {code}"


def _send(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        rank.send(number)


def _die_with(parent: int) -> None:
    """Linux only: a rank must not hold its GPU when the process that watches over it was killed, be it just before."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def main() -> int:
    paths = RunPaths.from_environment()
    plan = read_plan(paths)
    node = os.environ.get("SLURMD_NODENAME", "localhost")
    command = VERIFY if sys.argv[1:] == ["--verify"] else COMMAND
    ranks = start(plan, paths, os.environ, int(os.environ.get("SLURM_NODEID", "0")), command)
    forward_signals(ranks)
    return watch(ranks, record_death(paths, os.environ, node))


if __name__ == "__main__":
    sys.exit(run(main))
