"""The loop: optimizer steps until the run is finished or told to stop. It knows protocols, not their makers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import tee

import torch

from hpcft.plan.plan import Plan
from hpcft.run.ledger import Ledger
from hpcft.slurm.cause import Cause
from hpcft.train.batches import Step, on_device
from hpcft.train.console import Console, told_of
from hpcft.train.evaluate import Evaluation
from hpcft.train.metrics import Metrics
from hpcft.train.optim import learning_rate
from hpcft.train.order import Order, forward_seed
from hpcft.train.progress import Progress
from hpcft.train.protocols import Objective, Sharded, Windows
from hpcft.train.report import ROW, Interval, NotFinite, Report, peak_memory
from hpcft.train.saving import Saving
from hpcft.train.stopping import Asked, Stopping
from hpcft.train.totals import Totals
from hpcft.train.world import World


@dataclass
class Run:
    """Everything the loop works with, on one rank."""

    plan: Plan
    world: World
    sharded: Sharded
    objective: Objective
    windows: Windows
    order: Order
    steps: Iterator[Step]
    total_steps: int
    progress: Progress
    evaluation: Evaluation
    saving: Saving
    stopping: Stopping
    metrics: Metrics
    console: Console
    ledger: Ledger
    interval: Interval
    updating: float = 0.0  # seconds the last update took this host; the next step's, whose exchange tells the ranks

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps or self.evaluation.hopeless


def train(run: Run, stepped: Callable[[], None] | None = None) -> bool:
    """True when the run is finished and its last checkpoint published; False when it was stopped, saved or not.

    stepped: called once, when the first step has been taken.
    """
    asked = run.stopping.look()  # a signal may have come while the model was loaded
    while not at_edge(run, asked):
        if run.finished:
            run.saving.save("end")
            return True
        report = optimizer_step(run, next(run.steps))
        record(run, report)
        if report.finite:
            run.saving.reserve()
        if stepped is not None:
            stepped()
            stepped = None
        asked = report.asked
    return False


def optimizer_step(run: Run, step: Step) -> Report:
    """Forward and backward over this rank's micro batches, one sum over the ranks, one update. Raises NotFinite."""
    rate = learning_rate(run.plan.optim, run.progress.step, run.total_steps)
    report = accumulate_and_step(run, step, rate)
    if report.save_failed:
        run.saving.settle()  # now and not at the next save: it may have to be the run's end
    report.check_clipping(run.plan.optim.max_grad_norm)
    started = time.perf_counter()
    run.sharded.end_step(report.finite)
    if report.finite:
        run.sharded.scale.grow()
    else:
        give_up_or_skip(run, report)
    run.updating = time.perf_counter() - started
    run.progress.advance(len(step.windows), int(report.total("tokens")), int(report.total("trained")))
    return report


def accumulate_and_step(run: Run, step: Step, rate: float) -> Report:
    """The gradients of the step's mean loss per unit, reduced, clipped and stepped with; the ranks' numbers exchanged.

    The update is queued before the host waits for the step's numbers, so that the device has work meanwhile.
    """
    started, waited, trained, tokens = time.perf_counter(), 0.0, 0, 0
    divisor = sum(run.objective.units(run.windows, window) for window in step.windows)
    totals, (looked_at, micros) = Totals(run.world.device), tee(step.micros)
    batches = (on_device(micro.batch, run.world.device) for micro in looked_at)
    known = run.world.known(run.objective.ahead(run.sharded.model, batches))
    del looked_at, batches  # or every micro batch would be kept for them
    for number in range(1, step.count + 1):
        asked_at = time.perf_counter()
        micro = next(micros)
        waited += time.perf_counter() - asked_at
        batch = on_device(micro.batch, run.world.device)
        torch.manual_seed(forward_seed(run.plan.train.seed, run.progress.step, micro.share.position))
        loss = run.objective.loss(run.sharded.model, batch, known)
        run.sharded.backward(loss.value / max(divisor, 1), last=number == step.count)
        totals.add(loss, run.objective.count(batch))
        trained += batch.trained.numel()
        tokens += micro.tokens
    run.sharded.reduce()
    norm = run.sharded.norm()
    good = run.world.least((torch.isfinite(norm) & torch.isfinite(totals.loss)).float())
    read = totals.asked(norm, good)
    run.sharded.step(rate, clipping(norm, run.plan.optim.max_grad_norm), good)
    total, measured, norms = read()  # the one place where the host waits for the device
    counted: list[float] = [total, totals.units, tokens, trained, *measured]
    counted = counted if run.world.speaks else [0.0] * len(counted)
    seconds, memory = run.updating + time.perf_counter() - started, peak_memory(run.world.device)
    row = [*counted[:4], seconds, waited, memory, float(run.saving.failing), *norms, *counted[4:]]
    rows = run.world.exchange([*row, *run.stopping.flags()])
    if (units := int(sum(r[1] for r in rows))) != divisor:
        raise RuntimeError(f"the ranks counted {units} units in a step of {divisor}: a window was lost or read twice")
    asked = run.stopping.agreed([r[len(row) :] for r in rows])
    sums = totals.named([sum(column) for column in zip(*(r[len(ROW) : len(row)] for r in rows), strict=True)])
    return Report(run.progress.step + 1, step.windows, rows, rate, asked, run.plan.layout, sums)


def clipping(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are divided by: so that it becomes ``max_norm`` where it is more; 0 is no bound."""
    return torch.clamp((norm + 1e-6) / max_norm, min=1.0) if max_norm > 0 else torch.ones_like(norm)


def give_up_or_skip(run: Run, report: Report) -> None:
    """A step without finite numbers changes nothing; whether the run survives it is the plan's word."""
    scale = run.sharded.scale
    if report.loss_finite and scale.can_shrink:
        scale.shrink()  # float16 overflows now and then; that is what the scale is for
    elif run.plan.train.nonfinite == "stop":
        run.saving.settle()  # what is being saved is from before, and good
        raise NotFinite(report, run.plan.batch.micro_windows)
    else:
        run.console.say(f"WARNING: skipped {NotFinite(report, run.plan.batch.micro_windows)}")
    run.progress.skipped += 1


def record(run: Run, report: Report) -> None:
    """A line of metrics every logging_steps, at the end, and always for a step that was skipped."""
    run.interval.add(report)
    if run.progress.step % run.plan.train.logging_steps == 0 or run.finished or not report.finite:
        epoch = run.progress.consumed / run.order.windows
        line = run.interval.line(report, epoch, run.sharded.scale.value)
        run.metrics.write(line)
        run.console.step(line)


def at_edge(run: Run, asked: Asked) -> bool:
    """Evaluate, save, stop, in this order, as far as each is due. True when the run stops here."""
    if not asked.stop and run.evaluation.due():
        asked = evaluate(run, asked)
    if run.finished and not run.evaluation.due():
        return False  # nothing is left to come back for, whoever asks
    if not asked.stop and (reason := "asked" if asked.save else run.saving.due()):
        run.saving.save(reason)
        run.stopping.saved()
    return asked.stop is not None and stop(run, asked.stop)


def evaluate(run: Run, asked: Asked) -> Asked:
    """One evaluation, written down; what is asked for now, if a stop cut it short."""
    line = run.evaluation.run()
    if line is None:
        return run.stopping.look()
    run.metrics.write(line)
    told = told_of(line, "eval_")
    run.console.say(
        f"step {line['step']}: eval_loss {line['eval_loss']:.4f}{told}{' (best so far)' * line['eval_best']}"
    )
    return asked


def stop(run: Run, signal: str) -> bool:
    """Do as the cause of the signal wants: save, be requeued, or go on. True when the run stops here."""
    cause = run.stopping.why(signal, run.progress.step)
    run.console.say(f"told to stop at step {run.progress.step}: {cause.value}")
    if cause.goes_on:
        run.stopping.go_on()
        run.saving.save("asked")
        return at_edge(run, Asked(None, False))
    if cause.saves:
        run.saving.save("stop")
        run.stopping.leave(cause, signal)
    if cause is Cause.TEARDOWN:
        raise PeerLost("the job step is being ended because another rank died; nothing is saved")
    return True


class PeerLost(Exception):
    """Another rank's end, not this one's fault."""
