"""``replan``: the same run on another layout or under another strategy; its losses stay what they are.

But for what dropout draws, where layers are compiled before or after and not both.
"""

from __future__ import annotations

import dataclasses

from hpcft.catalog import STRATEGIES
from hpcft.config.cluster import ClusterProfile
from hpcft.errors import Refusal, near, refuse
from hpcft.plan.activations import chunk_rows
from hpcft.plan.batch import plan_batch
from hpcft.plan.checks import clashes, uncompilable
from hpcft.plan.layout import mesh
from hpcft.plan.make import cpus_per_rank, hardware_of, memory_of, variables
from hpcft.plan.memory import memory_plan
from hpcft.plan.plan import RECOMPUTATION, Plan, TrainPlan
from hpcft.plan.prediction import MemoryPlan
from hpcft.plan.ways import SPENT, clearly_too_large, fits


def replan(
    plan: Plan,
    *,
    nodes: int | None = None,
    nproc_per_node: int | None = None,
    time_minutes: int | None = None,
    cluster: ClusterProfile | None = None,
    strategy: str | None = None,
    tp: int | None = None,
    dp_replicate: int | None = None,
) -> Plan:
    """The same run on another layout: batch, data and schedule stay; raises Refusal where the batch does not divide.

    Only the allocation and the way the model is spread over it change: the global batch is kept, so the losses are
    those of the first layout. cluster: the profile, so that cores and environment follow too; a run that leaves its
    one node needs it, since the variables of the fabric are set for several nodes only.
    """
    old = plan.layout
    nodes, per_node = nodes or old.nodes, nproc_per_node or old.ranks_per_node
    if nodes > 1 and old.nodes == 1 and cluster is None and plan.resources.accelerator != "cpu":
        raise refuse("a run of one node has no settings of the fabric", value=f"{nodes} nodes",
                     hint="name the cluster profile: --cluster NAME")  # fmt: skip
    tp, dp_replicate = tp or old.degree("tp"), dp_replicate or old.degree("dp_replicate")
    train = _respread(plan, strategy or plan.train.strategy, tp, dp_replicate)
    layout = mesh(nodes, per_node, tp=tp, dp_replicate=dp_replicate)
    if layout != old or train.strategy != plan.train.strategy:
        train = dataclasses.replace(train, resharding=True)  # what had room for gathered weights may have none now
    per_rank, rest = divmod(plan.batch.global_windows, layout.data_parallel)
    held = plan.resources
    own_memory = cluster is None or held.memory not in (cluster.mem, None)  # said by a person: it stays
    batch = plan_batch(
        data_parallel=layout.data_parallel, max_length=plan.data.max_length, global_windows=plan.batch.global_windows,
        # Never more windows in a forward pass than before: the card that held those may not hold more.
        micro=None if rest else next(n for n in range(plan.batch.micro_windows, 0, -1) if per_rank % n == 0),
        accumulation=None, eval_windows=plan.batch.eval_windows,
    )  # fmt: skip
    resources = dataclasses.replace(
        held, nodes=nodes, tasks_per_node=per_node, gpus_per_node=per_node if held.gpus_per_node else 0,
        cpus_per_task=cpus_per_rank(cluster, layout) if cluster else held.cpus_per_task,
        memory=memory_of(cluster, layout, held.exclusive) if cluster and not own_memory else held.memory,
        time_minutes=time_minutes or held.time_minutes,
    )  # fmt: skip
    environment = variables(cluster, layout, plan.train.dataloader_workers) if cluster else plan.environment
    new = dataclasses.replace(plan, layout=layout, batch=batch, train=train, resources=resources,
                              environment=environment)  # fmt: skip
    return _held(new, cluster)


def _respread(plan: Plan, strategy: str, tp: int, dp_replicate: int) -> TrainPlan:
    """The rules of the loop with another strategy. Raises Refusal where it cannot do what the run asks."""
    if strategy not in STRATEGIES:
        guess = near(strategy, STRATEGIES)
        raise refuse("strategy: no such value", value=strategy, choices=STRATEGIES,
                     hint=f"did you mean {guess}?" if guess else "")  # fmt: skip
    tuner, model = plan.tuner, plan.model
    problems = clashes(
        strategy, tp, dp_replicate, tuner=tuner.kind, target_modules=tuner.target_modules,
        modules_to_save=tuner.modules_to_save, dora=tuner.use_dora, dtype=model.dtype,
        quantization=model.quantization, main_params=model.main_params_dtype, compiled=False,
    )  # fmt: skip
    if found := [problem for _, problem in problems]:
        raise Refusal(found)
    kept = plan.train.deepspeed if strategy.startswith("zero") else ""
    compiled = plan.train.compiled and not any(uncompilable(strategy))  # it is speed, which is not what is asked
    return dataclasses.replace(
        plan.train, strategy=strategy, strategy_module=STRATEGIES[strategy].module, deepspeed=kept, compiled=compiled
    )


def _held(plan: Plan, cluster: ClusterProfile | None) -> Plan:
    """``plan`` with its prediction, and with less that only needs room, or more recomputed, where the GPUs it has now
    would not hold it.
    """
    foretold = _foretold(plan, cluster)
    if foretold is not None and foretold != plan.memory:  # or it is the same run on the same GPUs
        usual = chunk_rows(foretold.shape.vocabulary)
        if not fits(dataclasses.replace(plan, memory=foretold), SPENT):
            chunk = 0 if plan.train.loss_chunk > usual else plan.train.loss_chunk
            plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, resharding=True, loss_chunk=chunk))
    for level in RECOMPUTATION[RECOMPUTATION.index(plan.train.recomputation) :]:
        new = dataclasses.replace(plan, train=dataclasses.replace(plan.train, recomputation=level))
        new = dataclasses.replace(new, memory=_foretold(new, cluster))
        if new.memory is None or not clearly_too_large(new):
            break
    return new


def _foretold(plan: Plan, cluster: ClusterProfile | None) -> MemoryPlan | None:
    """The prediction for another layout than that of ``plan.memory``."""
    if plan.memory is None:
        return None
    new = memory_plan(plan, plan.memory.shape, hardware_of(cluster) if cluster else plan.memory.hardware)
    return plan.memory if dataclasses.replace(plan.memory, options=(), reason="") == new else new
