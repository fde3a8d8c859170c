"""A run put together on one rank: data, model, strategy, checkpoint, and the parts that watch over them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hpcft.plan.memory import memory_plan
from hpcft.plan.plan import Plan
from hpcft.plan.steps import total_steps
from hpcft.plan.ways import HEADROOM
from hpcft.run.ledger import Ledger, attempt_of
from hpcft.run.paths import STORE_VARIABLE, RunPaths
from hpcft.slurm.commands import pauses
from hpcft.train.attention import check_packing
from hpcft.train.batches import steps
from hpcft.train.checkpoint import Store
from hpcft.train.compiling import compile_layers
from hpcft.train.console import Console
from hpcft.train.evaluate import Evaluation
from hpcft.train.head import fewer_at_a_time, head_of
from hpcft.train.loop import Run
from hpcft.train.metrics import Metrics
from hpcft.train.model import prepare_model, recompute
from hpcft.train.modes import give_factors, repeats_itself
from hpcft.train.order import Order
from hpcft.train.precision import DTYPES
from hpcft.train.progress import Progress
from hpcft.train.reference import with_references
from hpcft.train.report import Interval
from hpcft.train.saving import NOTHING, Saving
from hpcft.train.signals import Signals
from hpcft.train.stopping import Stopping
from hpcft.train.world import World

SEEN_WITHIN_SECONDS = 90.0  # NFS remembers for up to a minute that a name is not there


class Phase(Protocol):
    """See ``timeline``."""

    def __call__(self, name: str, seconds: float | None = None) -> None: ...


def untold(name: str, seconds: float | None = None) -> None:
    """Nobody wants to know."""


def assemble(
    plan: Plan,
    paths: RunPaths,
    world: World,
    signals: Signals,
    environ: Mapping[str, str],
    phase: Phase = untold,
    prepared: Any = None,
) -> Run:
    """Everything the loop needs, resumed where there is a checkpoint. phase: told when a part is done.

    prepared: the data, where it is not to be opened from the store. Raises Refusal for data or checkpoints that
    cannot be used.
    """
    prepared = prepared or open_data(plan, environ)
    plan = plan.with_labels(prepared.classes) if plan.labelled else plan
    phase("data")
    make_reproducible(plan)
    skeleton = prepare_model(plan, world, paths.recorded)
    phase("model")
    sharded = importlib.import_module(plan.train.strategy_module).build(skeleton, plan, world)
    skeleton.source.close()
    phase("weights", skeleton.reading)
    if plan.data.packing:  # now, and not before: only the strategy's copies have the type that is computed in
        dtype, config = DTYPES[plan.model.dtype], skeleton.model.config
        check_packing(sharded.model, config, world.device, dtype, plan.data.max_length)
    if not plan.scored:
        # Found out by a few tokens, which compiled layers had better not meet.
        head_of(sharded.model, world.device, plan.train.loss_chunk)
    phase("strategy")
    refers = plan.train.compiled and plan.objective.reference != "none"
    alike = refers and repeats_itself(sharded.model, world)
    compiled = plan.train.compiled and compile_layers(sharded.model, world)
    if plan.train.compiled and not compiled:
        spare_memory(plan, sharded.model, world)
    alike = alike and compiled
    if alike and plan.objective.reference == "adapters_off":
        give_factors(sharded.model, world.device)
    if plan.objective.reference == "precompute":
        prepared = with_references(plan, paths, world, sharded, prepared, alike and not plan.tuner.drops_out)
        phase("reference")
    store = Store(paths, plan, prepared.content, world.apart(), environ)
    progress, saved = _resume(store, sharded)
    phase("checkpoint")
    return _run(plan, world, sharded, prepared, store, progress, saved, signals, environ)


def open_data(plan: Plan, environ: Mapping[str, str]) -> Any:
    """The prepared shards. Raises Refusal with the ``prepare`` command where they are absent or stale.

    The first node of this very job may have prepared them: another one that had looked for the store before, as the
    preflight does, is told by NFS for a while that it is not there.
    """
    from hpcft.data.shards import open_prepared
    from hpcft.data.store import request_file

    store = Path(environ.get(STORE_VARIABLE) or plan.folders.store)
    for _ in pauses(SEEN_WITHIN_SECONDS if plan.layout.nodes > 1 else 0.0):
        if os.path.isfile(request_file(store, plan.data)):
            break
    return open_prepared(store, plan.data)


def spare_memory(plan: Plan, model: Any, world: World) -> None:
    """Recompute every layer where the Plan reckoned with compiled ones, and others would not fit; no more logits at a
    time than is usual.
    """
    memory = plan.memory
    if memory is None or memory.hardware.gpu_bytes is None:
        return
    eager = dataclasses.replace(plan, train=dataclasses.replace(plan.train, compiled=False))
    if memory_plan(eager, memory.shape, memory.hardware).total > HEADROOM * memory.hardware.gpu_bytes:
        recompute(model, "full")
        fewer_at_a_time(model)
        if world.first:
            print("WARNING: every layer is recomputed: not compiled, they would not fit", file=sys.stderr)


def make_reproducible(plan: Plan) -> None:
    """Seed what might draw numbers outside of a forward pass, whose own seeds follow from where the run stands."""
    random.seed(plan.train.seed)
    np.random.seed(plan.train.seed % 2**32)
    torch.manual_seed(plan.train.seed)
    if plan.train.deterministic:
        # Not warn_only: attention kernels take that for permission to stay nondeterministic.
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.benchmark = False


def _resume(store: Store, sharded: Any) -> tuple[Progress, tuple[int, int]]:
    """Where the run stands, and what of that this run itself has published: nothing of another run's checkpoint."""
    store.tidy()
    manifest = store.choose()
    progress = store.load(manifest, sharded) if manifest else Progress()
    own = manifest is None or manifest.folder.parent.resolve() == store.paths.checkpoints.resolve()
    return progress, (progress.step, progress.evaluated) if own else NOTHING


def _run(
    plan: Plan,
    world: World,
    sharded: Any,
    prepared: Any,
    store: Store,
    progress: Progress,
    saved: tuple[int, int],
    signals: Signals,
    environ: Mapping[str, str],
) -> Run:
    paths, objective = store.paths, importlib.import_module(plan.train.objective_module).build(plan.objective)
    order = Order(len(prepared.train), plan.batch.global_windows, plan.data.seed)
    total = total_steps(plan.optim, order.windows, order.global_windows)
    ledger = Ledger(paths, f"rank-{world.rank:04d}", environ)
    console = Console(world.first, progress.step, total)
    stopping = Stopping(signals, world, paths, ledger, environ, plan.resources.signal_lead)
    return Run(
        plan=plan,
        world=world,
        sharded=sharded,
        objective=objective,
        windows=prepared.train,
        order=order,
        steps=steps(prepared.train, order, progress.consumed, plan, world.data_rank, world.data_size),
        total_steps=total,
        progress=progress,
        evaluation=Evaluation(plan, world, sharded, objective, prepared.validation, order, progress, stopping, total),
        saving=Saving(plan.checkpoint, store, sharded, progress, ledger, console, signals, saved),
        stopping=stopping,
        metrics=Metrics(paths if world.first else None, progress.step, attempt_of(environ)),
        console=console,
        ledger=ledger,
        interval=Interval(progress),
    )
