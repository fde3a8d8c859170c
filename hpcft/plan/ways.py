"""The ways in which a run could be spread over its GPUs, each drafted and weighed by the models of memory and speed.

Weighed, the simpler first, since of equals the simpler one is taken: ddp; fsdp over all ranks, with a replica in each
node, with tensor parallelism inside a node; then what offloads. DeepSpeed's stages without offloading shard as fsdp
does and need another package, so they are only taken when asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpcft.catalog import STRATEGIES
from hpcft.errors import Refusal
from hpcft.plan.activations import logit_rows, micro_tokens
from hpcft.plan.memory import memory_plan, trains_head
from hpcft.plan.plan import BatchPlan, Plan
from hpcft.plan.prediction import Hardware, MemoryPlan, Option
from hpcft.plan.shape import Shape
from hpcft.plan.speed import step_time

HEADROOM = 0.95  # of a GPU that may be planned for: predictions err by some per cent
SPENT = 0.9  # of a GPU that is planned for where more could be recomputed
CHUNKS = (4, 2)  # times the usual logits at a time, where there is memory for them and something to be had
MOST_TOKENS = 16384  # of one forward pass, where nobody says how many windows it has: more is no faster
CLEARLY = 1.05  # of a GPU: a named strategy is refused only when predicted so far beyond it
OFFLOADING = ("fsdp_offload", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Way:
    """How a run could be spread; nodes and ranks_per_node None: as the run says."""

    strategy: str
    tp: int = 1
    dp_replicate: int = 1
    nodes: int | None = None
    ranks_per_node: int | None = None


Draft = Callable[[Way], Plan]  # the Plan of a way, without its memory; raises Refusal where the batch does not divide


@dataclass(frozen=True)
class Question:
    """What is to be decided.

    spends: as many windows may go through one forward pass as memory allows, because nobody has said how many.
    recomputation: what may be recomputed, the least first. most: (nodes, ranks of a node) that may be had.
    """

    draft: Draft
    shape: Shape
    hardware: Hardware
    spends: bool
    recomputation: tuple[str, ...]
    most: tuple[int, int]

    def fitted(self, plan: Plan) -> Plan:
        """``plan`` with its prediction, and with what it may choose: the fastest that fits, else what takes the least.

        Of each level of recomputation the most windows in a forward pass that fit are weighed, and for fsdp whether
        memory is left for gathered weights to stay until the backward pass, which need not gather them again then.
        """
        kept = (False, True) if plan.train.strategy == "fsdp" and self.hardware.gpu_bytes is not None else (True,)
        levels = [self._filled(plan, level, again) for level in self.recomputation for again in kept]
        possible = [level for level in levels if fits(level, self._share(level))]
        return self._larger_chunks(min(possible, key=pace)) if possible else levels[-1]

    def _larger_chunks(self, plan: Plan) -> Plan:
        """``plan`` with more logits at a time where the head is trained and they fit: each chunk reads and writes the
        sum of its gradient, which is several GB.
        """
        usual = logit_rows(plan, self.shape)
        if plan.train.loss_chunk or self.hardware.gpu_bytes is None or not trains_head(plan):
            return plan
        for times in CHUNKS:
            if usual * times // 2 < micro_tokens(plan):
                train = dataclasses.replace(plan.train, loss_chunk=usual * times)
                larger = self._foretold(dataclasses.replace(plan, train=train))
                if fits(larger, SPENT):
                    return larger
        return plan

    def _filled(self, plan: Plan, recomputation: str, resharding: bool) -> Plan:
        """``plan`` with so much recomputation, and with as many windows in a forward pass as fit, at least one."""
        train = dataclasses.replace(plan.train, recomputation=recomputation, resharding=resharding)
        for batch in self._batches(plan):
            foretold = self._foretold(dataclasses.replace(plan, train=train, batch=batch))
            if fits(foretold, self._share(foretold)):
                break
        return foretold

    def _share(self, plan: Plan) -> float:
        least = plan.train.resharding and plan.train.recomputation == self.recomputation[-1]
        return HEADROOM if least else SPENT

    def _batches(self, plan: Plan) -> Iterator[BatchPlan]:
        """The same optimizer step in fewer and fewer windows a forward pass."""
        per_rank = plan.batch.micro_windows * plan.batch.accumulation
        if not self.spends:
            yield plan.batch
            return
        most = max(plan.batch.micro_windows, MOST_TOKENS // plan.data.max_length)
        for micro in range(min(most, per_rank), 0, -1):
            if per_rank % micro == 0:
                yield dataclasses.replace(plan.batch, micro_windows=micro, accumulation=per_rank // micro)

    def _foretold(self, plan: Plan) -> Plan:
        return dataclasses.replace(plan, memory=memory_plan(plan, self.shape, self.hardware))

    def weighed(self, wanted: Way) -> list[Plan]:
        """The Plans of all ways on the GPUs of ``wanted``, with its degrees where it names some."""
        plans = []
        for way in self._ways(wanted):
            try:
                plans.append(self.fitted(self.draft(way)))
            except Refusal:  # the batch does not divide among its ranks, or it cannot be compiled as is asked
                continue
        return plans

    def _ways(self, wanted: Way) -> Iterator[Way]:
        plain = dataclasses.replace(wanted, strategy="ddp", tp=1, dp_replicate=1)
        try:
            like = self.draft(plain)
        except Refusal:
            return
        for way in ways(like, self.shape):
            if wanted.tp in (1, way.tp) and wanted.dp_replicate in (1, way.dp_replicate):
                yield dataclasses.replace(way, nodes=wanted.nodes, ranks_per_node=wanted.ranks_per_node)


def ways(plan: Plan, shape: Shape) -> Iterator[Way]:
    """What is weighed on the GPUs of ``plan``, the simpler first; it keeps weights in the type that was asked for."""
    main_params = plan.model.main_params_dtype
    return (way for way in _every_way(plan, shape) if main_params in STRATEGIES[way.strategy].main_params)


def _every_way(plan: Plan, shape: Shape) -> Iterator[Way]:
    """The same, whatever the type.

    Tensor parallelism never leaves a node, needs heads that divide and a family that is known to be cut right, and is
    for weights that are all trained: adapters and four bits are not cut. What offloads is for a base in the compute
    type; zero2 would not shard a frozen one.
    """
    nodes, per_node, full = plan.layout.nodes, plan.layout.ranks_per_node, plan.tuner.kind == "full"
    yield Way("ddp")
    yield Way("fsdp")
    if nodes > 1:
        yield Way("fsdp", dp_replicate=nodes)
    for tp in range(2, per_node + 1) if full and shape.cut_by_tensor else ():
        if per_node % tp == shape.kv_heads % tp == shape.heads % tp == shape.inner % tp == 0:
            yield Way("fsdp", tp=tp)
    if plan.model.quantization == "none":
        yield from (Way(name) for name in OFFLOADING if full or "weights" in STRATEGIES[name].shards)


def fits(plan: Plan, share: float = HEADROOM) -> bool:
    """Into that share of the GPU, and what is offloaded into the node's memory, which then must be known."""
    memory = memory_of(plan)
    return _holds(memory, share) and not (_offloads(plan) and (host_unknown(memory) or host_overflows(memory)))


def clearly_too_large(plan: Plan) -> bool:
    """Even if the prediction errs by a twentieth; what is not known does not hinder here."""
    memory = memory_of(plan)
    return not _holds(memory, CLEARLY) or (_offloads(plan) and host_overflows(memory))


def _holds(memory: MemoryPlan, share: float) -> bool:
    card = memory.hardware.gpu_bytes
    return card is None or memory.total <= card * share


def _offloads(plan: Plan) -> bool:
    return bool(STRATEGIES[plan.train.strategy].offload)


def host_unknown(memory: MemoryPlan) -> bool:
    """Does the profile not say how much memory a node has?"""
    return memory.hardware.host_bytes is None


def host_overflows(memory: MemoryPlan) -> bool:
    """Is a node's memory known, and too small?"""
    return memory.hardware.host_bytes is not None and memory.host > memory.hardware.host_bytes


def pace(plan: Plan) -> float:
    """Seconds a window: global batches differ where ranks do. 0 where the GPU's speed is not known: all are equal."""
    time = step_time(plan, memory_of(plan).shape, memory_of(plan).hardware)
    return time.total / plan.batch.global_windows if time else 0.0


def option(plan: Plan) -> Option:
    """``plan`` as it stands on the page of another."""
    memory = memory_of(plan)
    time = step_time(plan, memory.shape, memory.hardware)
    return Option(
        strategy=plan.train.strategy, tp=plan.layout.degree("tp"), dp_replicate=plan.layout.degree("dp_replicate"),
        micro_windows=plan.batch.micro_windows, gpu_bytes=memory.total, host_bytes=memory.host,
        seconds=float(f"{time.total:.4g}") if time else None, fits=fits(plan),
    )  # fmt: skip


def memory_of(plan: Plan) -> MemoryPlan:
    """The prediction that every weighed Plan has."""
    assert plan.memory is not None
    return plan.memory
