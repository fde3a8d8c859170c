"""A rank that trains nothing and behaves like one: it counts steps, saves, answers signals and keeps the ledger.

STANDIN_STEPS: steps to do. STANDIN_PACE: seconds a step. STANDIN_DIE: ``attempt:rank:step`` where a rank kills itself.
A file ``enough`` in the working directory ends the run early.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from hpcft.plan.place import place_from_environment
from hpcft.run.folder import read_plan
from hpcft.run.lease import still_mine
from hpcft.run.ledger import Ledger, attempt_of
from hpcft.run.paths import RunPaths
from hpcft.slurm.cause import Cause, why_signalled
from hpcft.slurm.requeue import requeue

asked: list[str] = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, _: asked.append(signal.Signals(n).name))

paths = RunPaths.from_environment()
plan = read_plan(paths)
place = place_from_environment(os.environ, plan.layout)
ledger = Ledger(paths, f"rank-{place.rank:04d}")
state = paths.root / "state.json"
died = paths.attempt(attempt_of(os.environ)) / "died"


def save(step: int, reason: str) -> None:
    if place.rank == 0 and still_mine(paths, os.environ):
        aside = state.with_suffix(".tmp")
        aside.write_text(json.dumps(step))
        os.replace(aside, state)
        ledger.write("saved", step=step, seconds=0.0, reason=reason)


def stop(step: int) -> None:
    if died.exists():  # real ranks find that out before they ask Slurm: they meet at every step edge
        ledger.write("failed", rank=place.rank, node=place.node, error="Connection closed by peer", peer=True)
        sys.exit(1)
    cause = why_signalled(os.environ, asked[0], plan.resources.signal_lead, 30)
    if cause.saves:
        save(step, "stop")
    if place.rank == 0:
        ledger.write("stopping", cause=cause.name.lower(), step=step)
        if cause is not Cause.TEARDOWN and cause.requeues and requeue(os.environ, 30):
            ledger.write("requeued", by="rank 0")
    sys.exit(75)


first = json.loads(state.read_text()) if state.exists() else 0
if place.rank == 0:
    ledger.write("started", step=first, checkpoint=None, world=plan.layout.world_size)
for step in range(first + 1, int(os.environ.get("STANDIN_STEPS", "10")) + 1):
    time.sleep(float(os.environ.get("STANDIN_PACE", "0.05")))
    if os.environ.get("STANDIN_DIE") == f"{attempt_of(os.environ)}:{place.rank}:{step}":
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if asked:
        stop(step)
    if os.path.exists("enough"):
        break
    if plan.checkpoint.save_steps and step % plan.checkpoint.save_steps == 0:
        save(step, "interval")
print(f"rank {place.rank} did its steps", flush=True)
if place.rank == 0:
    save(step, "end")
    ledger.write("finished", step=step)
