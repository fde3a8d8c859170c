"""A run without Slurm: the batch script's flow in one process on this machine.

submitit's local executor starts it as its one task. Nobody requeues here, so TERM and INT mean: let the ranks save,
then stop for good.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from hpcft.errors import count
from hpcft.launch import ranks
from hpcft.launch.accept import EXIT_GO_ON, accept
from hpcft.launch.after import after, report
from hpcft.launch.begin import begin
from hpcft.launch.decide import Action
from hpcft.launch.entry import run, say
from hpcft.launch.preflight import refuse_missing_packages, refuse_unprepared
from hpcft.plan.plan import Plan
from hpcft.run.expand import exported, store_folder
from hpcft.run.lease import local_job, release
from hpcft.run.ledger import ATTEMPT_VARIABLE, JOB_VARIABLE, Ledger, read_events
from hpcft.run.paths import RUN_VARIABLE, STORE_VARIABLE, RunPaths


class Stop:
    """What a person asked of this run, and the ranks that have to hear of it."""

    def __init__(self) -> None:
        self.asked = False
        self.ranks: Sequence[ranks.Rank] = ()

    def listen(self) -> None:
        """TERM and INT stop the run; USR1 (save now) is passed on; a closing terminal is none of our business."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR1, lambda number, _: self._send(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)


def run_here(plan: Plan, text: str, paths: RunPaths, stop: Stop, command: Sequence[str] = ranks.COMMAND) -> int:
    """Attempts, one after another, until the run is done, stopped or out of budget; 0 when it is done."""
    environ = {**exported(plan, os.environ), JOB_VARIABLE: local_job(), RUN_VARIABLE: str(paths.root)}
    environ.setdefault(STORE_VARIABLE, str(store_folder(plan)))
    if accept(text, paths, environ) != EXIT_GO_ON:
        return 0
    try:
        refuse_unprepared(plan, environ)
        refuse_missing_packages(plan)
        while True:
            action = one_attempt(plan, paths, environ, stop, command)
            if action is not Action.NEW_STEP:
                return int(action.value)
    finally:
        release(paths, environ)


def one_attempt(
    plan: Plan, paths: RunPaths, environ: dict[str, str], stop: Stop, command: Sequence[str] = ranks.COMMAND
) -> Action:
    """Start the ranks, wait for them, decide."""
    attempt = begin(plan, paths, environ)
    environ = {
        **environ,
        ATTEMPT_VARIABLE: str(attempt.number),
        "MASTER_ADDR": attempt.address,
        "MASTER_PORT": str(attempt.port),
    }
    stop.ranks = ranks.start(plan, paths, environ, 0, command)
    if stop.asked:  # it came while the ranks were being started
        stop._send(signal.SIGTERM)
    code = ranks.watch(stop.ranks, ranks.record_death(paths, environ, "this machine"))
    if stop.asked and not any(event["event"] == "finished" for event in read_events(paths)):
        with suppress(OSError):
            Ledger(paths, "batch", environ).write("cancelled", by="a signal to the run")
    decision = after(plan, paths, environ, code, stop.asked)
    report(plan, paths, read_events(paths), decision)
    return decision.action


def main() -> int:
    os.umask(0o077)
    stop = Stop()
    stop.listen()
    paths = RunPaths.from_environment()
    text = (paths.handed_over if paths.handed_over.exists() else paths.plan).read_text(encoding="utf-8")
    plan = Plan.from_json(text, where=str(paths.handed_over))
    say(f"run {plan.name} on this machine, {count(plan.layout.world_size, 'rank')}, process {os.getpid()}")
    return run_here(plan, text, paths, stop)


if __name__ == "__main__":
    sys.exit(run(main))
