"""One rank of a run of ours, timed: python -m benchmarks.ours TASK.json"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

from benchmarks import kernels
from benchmarks.made import Prepared
from benchmarks.stopwatch import Stopwatch, since_start
from benchmarks.task import PROFILED, Task, read_task


def run(task: Task) -> None:
    """Load, train until the stopwatch has enough; rank 0 writes what came of it."""
    from hpcft.run.paths import RunPaths
    from hpcft.train import assemble, loop, world
    from hpcft.train.signals import Signals

    plan = task.plan()
    here = world.join(plan, os.environ)
    phases: dict[str, float] = {}

    def phase(name: str, seconds: float | None = None) -> None:
        phases[name] = since_start()

    phase("rendezvous")
    data = Prepared(task.windows())
    made = assemble.assemble(plan, RunPaths(task.place), here, Signals(), os.environ, phase, data)
    watch = Stopwatch(task.limits, here.device.type, here.first)
    losses, norms = [], []
    over = False
    while not over:
        report = loop.optimizer_step(made, next(made.steps))
        losses.append(report.mean_loss)
        norms.append(report.norm)
        over = watch.ended()
    facts = {"losses": losses, "norms": norms, "micro": plan.batch.micro_windows, "phases": phases, **watch.facts()}
    if task.profile:
        facts |= profiled(made, here)
    if here.first:
        task.result(facts)
    here.barrier()


def profiled(made: Any, here: Any) -> dict[str, Any]:
    """Of PROFILED optimizer steps of rank 0 the seconds by group of kernels, the longest of them and the gaps between;
    all ranks take part."""
    from torch.profiler import record_function

    from hpcft.train import loop

    def named(part: Any) -> Any:
        def inside(*arguments: Any) -> Any:
            with record_function(kernels.OPTIMIZER):
                return part(*arguments)

        return inside

    with ExitStack() as block:
        for name in ("step", "end_step"):  # DeepSpeed's engine steps in the second
            part = getattr(made.sharded, name)
            setattr(made.sharded, name, named(part))
            block.callback(setattr, made.sharded, name, part)
        found = block.enter_context(kernels.profiling(here.device.type)) if here.first else None
        for _ in range(PROFILED):
            loop.optimizer_step(made, next(made.steps))
    if found is None:
        return {}
    return {
        "kernels": found.groups(),
        "longest": found.longest(),
        "gaps": kernels.gaps(found.on_device()[0]),
    }


if __name__ == "__main__":
    run(read_task(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
