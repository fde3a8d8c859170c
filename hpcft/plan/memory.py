"""How much of a GPU and of its node a run takes, part by part: prediction, arithmetic, and what was measured.

With T trained and F frozen weights, d ranks that share shards, t tensor-parallel ranks, c bytes of compute type.
Every trained weight has a master and AdamW's two moments and a gradient, on every strategy: in float32 12 and 4 bytes,
in bfloat16 (main_params_dtype) 6 and 2. What a strategy shards, it divides by d (Rajbhandari et al. 2020, ZeRO, arXiv
1910.02054, section 5).

ddp      weights c·(T+F), gradients 4T, optimizer 12T        all divided by t; masters of the compute type are what is
                                                             computed with: c·F, 2T, 6T in bfloat16
zero1    as ddp, optimizer / d                               DeepSpeed keeps compute copies beside its partitions
zero2    gradients / d too, summed in buckets
zero3    weights / d too; up to ZERO_LIVE of them are gathered at a time
fsdp     sharded are the masters themselves, so there are no compute copies but of what is gathered: two layers (the
         next is fetched while one runs), or all of them where they stay until the backward pass; the last norm, and
         embedding or head where they are no units of their own, always stay; beside them the gradients of one unit, in
         compute type and in float32 for their sum
A step has four moments at one of which a GPU is fullest (``activations``): the parts are those of that moment.

offload  optimizer and gradients, and with weights these too, lie in the node's memory instead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.catalog import STRATEGIES
from hpcft.plan.activations import (
    BACKWARD,
    ENDS,
    FIRST,
    LOSS,
    MOMENTS,
    activation_bytes,
    logit_bytes,
    logit_rows,
    micro_tokens,
)
from hpcft.plan.hardware import GIB
from hpcft.plan.plan import Plan
from hpcft.plan.prediction import Hardware, MemoryPlan, Option
from hpcft.plan.shape import Shape
from hpcft.plan.weights import (
    BYTES,
    COMPUTE_BYTES,
    GATHERS,
    SUMMED,
    SUMS,
    Weights,
    all_weights,
    layer_weights,
    main_bytes,
    reads_peers,
    root_weights,
    sends_narrow,
)

SAVED = 12  # bytes of a trained weight in a checkpoint, and on the host before: master and moments, float32

# What tensors take is measured on H100 (docs/benchmarks.md); these beside them are from experience.
CONTEXT = 1 * GIB  # driver, kernels' code, cuBLAS workspace
FRAGMENTATION = 0.03  # of what comes and goes within a step: gaps between tensors, with expandable segments
NCCL = GIB // 2  # of each axis of the mesh that has more than one rank: channels and their buffers
PROCESS = 4 * GIB  # of the node's memory for each rank: Python, torch, pinned batches

ZERO_BUCKET = 200_000_000  # numbers in a bucket of DeepSpeed's, as we set it; two of them, so that sums overlap
ZERO_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Part:
    """Bytes of one kind of thing, and how they come about."""

    name: str
    bytes: int
    arithmetic: str


def memory_plan(
    plan: Plan, shape: Shape, hardware: Hardware, options: tuple[Option, ...] = (), reason: str = ""
) -> MemoryPlan:
    """The prediction for ``plan``, whose own ``memory`` is not looked at."""
    parts = {part.name: part.bytes for part in gpu_parts(plan, shape)}
    host = sum(part.bytes for part in host_parts(plan, shape))
    return MemoryPlan(shape=shape, hardware=hardware, **parts, host=host, options=options, reason=reason)


def gpu_parts(plan: Plan, shape: Shape) -> tuple[Part, ...]:
    """What lies on one GPU at the fullest moment of a step, in the order and by the names of MemoryPlan."""
    return max((gpu_parts_at(plan, shape, moment) for moment in MOMENTS), key=_size_of)


def _size_of(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


def gpu_parts_at(plan: Plan, shape: Shape, moment: str) -> tuple[Part, ...]:
    """The same at one of its MOMENTS."""
    weights = all_weights(plan, shape)
    comes_and_goes = [
        _gathered(plan, shape, moment), _activations(plan, shape, moment), _logits(plan, shape, moment)
    ]  # fmt: skip
    fragments = int(FRAGMENTATION * sum(part.bytes for part in comes_and_goes))
    return (
        _on_gpu(_weights(plan, weights), "weights", plan),
        _on_gpu(_gradients(plan, weights, _come(plan, shape, weights, moment)), "optimizer", plan),
        _on_gpu(_optimizer(plan, weights), "optimizer", plan),
        *comes_and_goes,
        _communication(plan, shape),
        Part("reserve", CONTEXT + fragments, f"{CONTEXT // GIB} GiB of the driver, {FRAGMENTATION:.0%} for gaps"),
    )


def host_parts(plan: Plan, shape: Shape) -> tuple[Part, ...]:
    """What lies in the memory of one node, at its fullest."""
    weights, ranks = all_weights(plan, shape), plan.layout.ranks_per_node
    row = STRATEGIES[plan.train.strategy]
    moved = (
        [_gradients(plan, weights, weights.trained), _optimizer(plan, weights)] if "optimizer" in row.offload else []
    )
    moved += [_weights(plan, weights)] if "weights" in row.offload else []
    offloaded = sum(part.bytes for part in moved) * ranks
    return (
        Part("processes", PROCESS * ranks, f"{ranks} × {PROCESS // GIB} GiB"),
        Part("offloaded", offloaded, f"{ranks} ranks' share of {_words(moved) or 'nothing'}"),
        _loading_or_saving(plan, weights, shape),
    )


def _loading_or_saving(plan: Plan, weights: Weights, shape: Shape) -> Part:
    """A save copies masters and moments. Weights go from files to the GPU in parts; random ones are made whole, and so
    are experts, whose files have a tensor for each where the model has one for all.
    """
    saving = SAVED * weights.trained // plan.layout.nodes
    full = plan.tuner.kind == "full"
    number, size = (weights.trained, main_bytes(plan)) if full else (weights.frozen, weights.compute)
    loading = size * number if plan.model.from_scratch or shape.experts else 0
    if loading > saving:
        return Part("loading", loading, f"{size} B × {_big(number)} weights, whole on rank 0")
    nodes = f" / {plan.layout.nodes} nodes" if plan.layout.nodes > 1 else ""
    return Part("saving", saving, f"{SAVED} B × {_big(weights.trained)} trained{nodes}")


def _shards(plan: Plan, what: str) -> int:
    """Into how many parts ``what`` is cut: optimizer, gradients or weights."""
    data = plan.layout.degree("dp") if what in STRATEGIES[plan.train.strategy].shards else 1
    return data * plan.layout.degree("tp")


def _is_fsdp(plan: Plan) -> bool:
    return plan.train.strategy.startswith("fsdp")


def _on_gpu(part: Part, what: str, plan: Plan) -> Part:
    """``part``, or nothing where the strategy keeps ``what`` in the node's memory."""
    offloaded = what in STRATEGIES[plan.train.strategy].offload
    return Part(part.name, 0, "in the node's memory") if offloaded else part


def _weights(plan: Plan, weights: Weights) -> Part:
    """Frozen weights, and the copies of trained ones in the compute type where a strategy has them beside masters."""
    shards, c = _shards(plan, "weights"), weights.compute
    copies = 0 if _is_fsdp(plan) or c == main_bytes(plan) else weights.trained
    said = [f"{c} B × {_big(copies)} trained"] if copies else []
    if weights.frozen:
        said.append(f"{c} B × {_big(weights.frozen - weights.quantised)} frozen")
    if weights.quantised:
        bits, own = (8 * size for size in BYTES[weights.kind])
        said.append(f"{bits - own:g} bits × {_big(weights.quantised)} frozen, and {own:.3g} whole on every rank")
    size = _divided(c * copies + weights.frozen_bytes - weights.constants, shards) + weights.constants
    return Part("weights", size, _over(said, shards) if said else _no_copies(plan))


def _no_copies(plan: Plan) -> str:
    return f"the masters are what is {'sharded' if _is_fsdp(plan) else 'computed with'}"


def _come(plan: Plan, shape: Shape, weights: Weights, moment: str) -> int:
    """How many weights have a gradient; those that FSDP keeps come one by one in a step's only backward pass."""
    if not _is_fsdp(plan) or plan.batch.accumulation > 1 or moment == ENDS:
        return weights.trained
    layers = shape.layers * layer_weights(plan, shape).trained
    return layers + _head_unit(plan, shape) if moment == FIRST else 0


def _gradients(plan: Plan, weights: Weights, come: int) -> Part:
    shards, size = _shards(plan, "gradients"), main_bytes(plan)
    said = f"{size} B × {_big(weights.trained)} trained" if come else "not there yet when the GPU is fullest"
    return Part("gradients", _divided(size * come, shards), _over([said], shards) if come else said)


def _optimizer(plan: Plan, weights: Weights) -> Part:
    shards, size = _shards(plan, "optimizer"), 3 * main_bytes(plan)
    said = f"{size} B × {_big(weights.trained)} trained"
    return Part("optimizer", _divided(size * weights.trained, shards), _over([said], shards))


def _gathered(plan: Plan, shape: Shape, moment: str) -> Part:
    """What is whole for a moment: gathered weights, buckets, gradients on their way to the sum."""
    layer, root = layer_weights(plan, shape), root_weights(plan, shape)
    tp, c, head = plan.layout.degree("tp"), layer.compute, _head(plan, shape)
    if _is_fsdp(plan):
        ends = root.gathered_bytes - (0 if shape.tied else c * shape.embedding)  # an untied embedding is let go
        layers = 0 if moment == ENDS else shape.layers if not plan.train.resharding and moment != FIRST else 2
        one, last = (c + SUMMED) * layer.trained, c * root.trained + SUMMED * min(root.trained, shape.embedding)
        if unit := _head_unit(plan, shape):  # let go, and its gradient sent, before the last layer's
            copies = 1 if plan.tuner.kind == "full" else 2  # peft keeps the frozen one beside the trained one
            ends -= 0 if moment == LOSS else copies * c * unit
            sums = {LOSS: 0, BACKWARD: max(one, (c + SUMMED) * unit), FIRST: one, ENDS: last - c * unit}[moment]
        else:
            sums = {LOSS: 0, BACKWARD: one + c * head, FIRST: one + c * head, ENDS: last}[moment]
        size = layers * layer.gathered_bytes + ends + sums
        text = (
            f"{layers} layers of {_size(layer.gathered_bytes)}, {_size(ends)} of the ends, {_size(sums)} of gradients"
        )
    elif STRATEGIES[plan.train.strategy].shards:
        whole = all_weights(plan, shape)
        buckets = 2 * c * min(ZERO_BUCKET, whole.trained)
        sharded = "weights" in STRATEGIES[plan.train.strategy].shards
        live = c * min(ZERO_LIVE, whole.trained + whole.frozen - whole.quantised) if sharded else 0
        # One layer's gradients are on their way to the node while the next layer's are computed.
        down = SUMMED * layer.trained if "optimizer" in STRATEGIES[plan.train.strategy].offload else 0
        size = buckets + live + down
        text = f"{_size(buckets)} of DeepSpeed's buckets, {_size(live)} of gathered weights"
        text += f", {_size(down)} of gradients on their way" if down else ""
    else:
        one = layer.trained + (head if shape.tied else 0)
        last = root.trained + (head if shape.tied else 0)
        size = c * {LOSS: 0, BACKWARD: layer.trained + head, FIRST: one, ENDS: last}[moment]
        text = f"a gradient before it is added to its {plan.model.main_params_dtype} sum"
    unpacked = 0 if moment == LOSS else _unpacked(plan, shape)
    return Part(
        "gathered", _divided(size, tp) + unpacked, text + (", what is multiplied in other bits" if unpacked else "")
    )


def _communication(plan: Plan, shape: Shape) -> Part:
    """NCCL's own, and the buffers out of which ranks copy FSDP's layers; torch's allocator sees neither."""
    axes = [axis.name for axis in plan.layout.axes if axis.degree > 1]
    size, text = NCCL * len(axes), f"{NCCL / GIB:g} GiB for each of: {', '.join(axes) or 'no axis'}"
    if reads_peers(plan):
        layer, tp = layer_weights(plan, shape), plan.layout.degree("tp")
        number = GATHERS + (SUMS if sends_narrow(plan) else 0)
        read = _divided(number * layer.gathered_bytes, tp)
        size, text = size + read, f"{text}; {_size(read)} of {number} layers that ranks copy from each other"
    return Part("communication", size, text)


def _head(plan: Plan, shape: Shape) -> int:
    """Weights of the head whose gradient is computed."""
    return shape.embedding if trains_head(plan) else 0


def _head_unit(plan: Plan, shape: Shape) -> int:
    """The same where the head is a unit of FSDP's and not in the root's."""
    return 0 if shape.tied or plan.layout.degree("tp") > 1 else _head(plan, shape)


def trains_head(plan: Plan) -> bool:
    """Is the matrix that makes logits trained?"""
    return not plan.scored and (plan.tuner.kind == "full" or "lm_head" in plan.tuner.modules_to_save)


def _unpacked(plan: Plan, shape: Shape) -> int:
    """Four bits: the largest matrix in the compute type, while it is multiplied.

    Eight: the gradient of the widest output on its way to eight bits, two float32 copies and they; the matrix turned.
    """
    if plan.model.quantization == "none":
        return 0
    if plan.model.quantization == "fp8":
        sizes = shape.linears().values()
        return 9 * micro_tokens(plan) * max(o for _, o in sizes) + max(i * o for i, o in sizes)
    return COMPUTE_BYTES[plan.model.dtype] * max(i * o for i, o in shape.linears().values())


def _activations(plan: Plan, shape: Shape, moment: str) -> Part:
    size, tokens, tp = activation_bytes(plan, shape, moment), micro_tokens(plan), plan.layout.degree("tp")
    each = f"{size * tp / tokens / 1e6:.2f} MB"
    text = f"{tokens:,} tokens × {each}{f' / {tp}' if tp > 1 else ''}, recomputation {plan.train.recomputation}"
    return Part("activations", size, text)


def _logits(plan: Plan, shape: Shape, moment: str) -> Part:
    """A chunk of them, and the head's gradient, which is summed over the chunks in float32."""
    rows = logit_rows(plan, shape)
    if not rows:
        return Part("logits", 0, "none: a text is scored at its last token")
    if moment != LOSS:
        return Part("logits", 0, "none in the backward pass, when the GPU is fullest")
    tp = plan.layout.degree("tp")
    size, sums = logit_bytes(plan, shape), SUMMED * _head(plan, shape) // tp
    columns = shape.vocabulary // tp
    text = f"{size / (rows * columns):.0f} B × {rows:,} rows × {columns:,} words"
    return Part("logits", size + sums, text + (f", the head's gradient of {_size(sums)}" if sums else ""))


def _divided(size: int, among: int) -> int:
    return -(-size // among)


def _over(said: Sequence[str], shards: int) -> str:
    text = " + ".join(said)
    return text if shards == 1 else f"({text}) / {shards}" if len(said) > 1 else f"{text} / {shards}"


def _words(parts: Sequence[Part]) -> str:
    return ", ".join(part.name for part in parts)


def _big(number: int) -> str:
    """7.62 B, 40.4 M."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB"


def measured(plan: Plan, peak: int) -> str | None:
    """One line: predicted against ``peak``, bytes of tensors at the fullest on the fullest rank; None without either.

    What the driver and NCCL hold is in neither: torch's allocator does not see it.
    """
    if plan.memory is None or not peak:
        return None
    predicted = plan.memory.allocated
    off = peak / predicted - 1
    return (
        f"memory: predicted {predicted / GIB:.1f} GiB, measured {peak / GIB:.1f} GiB "
        f"({'+' if off >= 0 else '−'}{abs(off):.0%})"
    )
