"""How long an optimizer step takes: arithmetic, traffic between GPUs that is not hidden, traffic to the host.

FLOP  Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): 2 per weight and token forward, 2 for the gradient of the
      inputs, 2 for that of the weights, which frozen ones need not: 6 for full, 4 for LoRA; 2 more where a layer is
      recomputed, and for each forward pass that a preference objective needs beside, whose head also runs twice.
      Causal attention: 2·q·S per token, layer and pass, three passes (the backward one is two), over whole windows:
      packed short records take less.
between products  what norms, gates and rotations read and write: in a layer about 24 numbers of the hidden size and 8
      of the feed-forward's width for each token, and a third again where it is recomputed; each kernel of its own where
      layers are not compiled.
traffic  of a collective over n ranks that moves Ψ bytes: Ψ·(n−1)/n for a gather or a scatter, twice that for a sum
      (Thakur et al. 2005). ddp sums T gradients once a step; zero1 scatters them and gathers weights; zero2 scatters
      them every forward pass; zero3 and fsdp gather weights twice (fsdp once where they may stay) and scatter
      gradients once every forward pass, and replicas then sum their shards. Tensor parallel: four gathers and four
      scatters of activations a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.catalog import STRATEGIES
from hpcft.plan.activations import kept_layers, micro_tokens
from hpcft.plan.hardware import PEAK_TFLOPS
from hpcft.plan.plan import Plan
from hpcft.plan.prediction import Hardware
from hpcft.plan.shape import Shape
from hpcft.plan.weights import COMPUTE_BYTES, SUMMED, all_weights, main_bytes, sent_bytes

# Shares of the peak and factors beside the GPU's copying speed are measured on H100 (docs/benchmarks.md), the rest is
# from data sheets.
PRODUCTS, ATTENTION = 0.66, 0.42  # of the peak: matrix products at the power limit, attention kernels
NORMS, GATES = 24, 8  # numbers of hidden size and of feed-forward width that are moved between products
COMPILED, EAGER = 1.35, 5.0  # times that what lies between products takes the traffic of the least that it moves
LOSS_BYTES = 10  # moved for a word of the vocabulary and a token
EIGHT_BITS = 1.5  # times that products are faster with a base in 8-bit floats
TO_EIGHT_BITS = 1.4  # times that what lies between is slower
ZERO3_LAYER = 5e-3  # seconds of the host for a layer of DeepSpeed's stage 3 in one pass
HIDDEN = 0.9  # of traffic that can run behind arithmetic
LATENCY = 30e-6  # seconds of one collective beside its bytes
HBM = 2e12  # bytes a second of a GPU's own memory, copying
NF4_TRAFFIC = 2.55  # bytes a weight that is made two bytes of four bits: 0.55 read, 2 written
CPU_ADAM = 4e9  # weights a second that AdamW updates on the cores of one node
RANK_ADAM = 1.5e9  # of them by the threads of one rank
# Bytes a trained weight: master, moments and gradient read, three of them written; of float32, the copy too.
OPTIMIZER_TRAFFIC = {"float32": 34, "bfloat16": 14}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. compute: on the GPU; exposed: traffic between GPUs that is waited for; host."""

    compute: float
    exposed: float
    host: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.host


def step_time(plan: Plan, shape: Shape, hardware: Hardware) -> StepTime | None:
    """The prediction; None where the GPU's peak is not known."""
    peak = peak_of(plan)
    if not peak or plan.resources.accelerator == "cpu":
        return None
    products, attention = step_flop(plan, shape)
    rate = plan.layout.world_size * peak
    faster = EIGHT_BITS if plan.model.quantization == "fp8" else 1.0
    arithmetic = products / (rate * PRODUCTS * faster) + attention / (rate * ATTENTION) + _between_products(plan, shape)
    compute = arithmetic + _own_memory(plan, shape)
    exposed = _unhidden(_data_traffic(plan, shape, hardware), arithmetic) + _tensor_traffic(plan, shape, hardware)
    if plan.train.strategy.startswith("zero3"):
        exposed += ZERO3_LAYER * shape.layers * plan.batch.accumulation * 2
    return StepTime(compute, exposed, _host(plan, shape, hardware, arithmetic))


def peak_of(plan: Plan) -> float:
    """Operations a second of one GPU by its data sheet; 0 where its kind is not known."""
    return PEAK_TFLOPS.get((plan.resources.gpu_type or "").lower(), 0.0) * 1e12


def step_flop(plan: Plan, shape: Shape) -> tuple[float, float]:
    """Floating-point operations of one optimizer step on all ranks together, windows taken as full: of matrix products,
    and of attention.
    """
    tokens = plan.batch.global_windows * plan.data.max_length
    work = 6 if plan.tuner.kind == "full" else 4
    again = 2 * (shape.layers - kept_layers(plan, shape))  # of layers that run forward twice
    attention = 2 * shape.query * plan.data.max_length
    layers = shape.active * (work * shape.layers + again)
    beside = forwards_beside(plan) * 2 * (shape.layers * shape.active + shape.embedding)
    head = 0 if plan.scored else shape.embedding * (work + (2 if _head_runs_twice(plan) else 0))
    passes = shape.layers * (3 + forwards_beside(plan)) + again / 2
    return tokens * (layers + head + beside), tokens * attention * passes


def _between_products(plan: Plan, shape: Shape) -> float:
    """Seconds on one GPU of all that is no matrix product and no attention."""
    tokens = plan.batch.global_windows * plan.data.max_length / plan.layout.world_size
    moved = COMPUTE_BYTES[plan.model.dtype] * (NORMS * shape.hidden + GATES * shape.feed_forward)
    passes = shape.layers * (1 + forwards_beside(plan) / 3) + (shape.layers - kept_layers(plan, shape)) / 3
    times = (COMPILED if plan.train.compiled else EAGER) * (TO_EIGHT_BITS if plan.model.quantization == "fp8" else 1)
    loss = 0 if plan.scored else LOSS_BYTES * shape.vocabulary
    return tokens * (moved * passes * times + loss) / HBM


def _head_runs_twice(plan: Plan) -> bool:
    """Not where the loss is a plain sum of log-probabilities, and its gradient known in the forward pass."""
    return plan.data.rows != "chat" or plan.model.dtype == "float16" or plan.train.strategy.startswith("zero3")


def forwards_beside(plan: Plan) -> int:
    """Forward passes without a backward one: of the reference, and of rated prompts with other answers."""
    reference = int(plan.objective.reference == "adapters_off")
    return reference + (1 + reference if plan.data.rows == "rated" else 0)


def _own_memory(plan: Plan, shape: Shape) -> float:
    """Seconds that the GPU's own memory takes: the optimizer's pass, and four bits made two bytes in every pass."""
    weights = all_weights(plan, shape)
    row, moved = STRATEGIES[plan.train.strategy], OPTIMIZER_TRAFFIC[plan.model.main_params_dtype]
    shards = plan.layout.degree("tp") * (plan.layout.degree("dp") if "optimizer" in row.shards else 1)
    update = 0.0 if "optimizer" in row.offload else moved * weights.trained / shards
    passes = 2 + (1 - kept_layers(plan, shape) / shape.layers)
    if plan.model.quantization != "nf4":
        return update / HBM
    unpack = plan.batch.accumulation * passes * NF4_TRAFFIC * weights.quantised / plan.layout.degree("tp")
    return (update + unpack) / HBM


def _unhidden(traffic: float, arithmetic: float) -> float:
    return traffic - min(HIDDEN * traffic, arithmetic)


def _data_traffic(plan: Plan, shape: Shape, hardware: Hardware) -> float:
    """Seconds of traffic along the data axes in one step."""
    weights, row, layout = all_weights(plan, shape), STRATEGIES[plan.train.strategy], plan.layout
    tp, n, replicas = layout.degree("tp"), layout.degree("dp"), layout.degree("dp_replicate")
    gathered, summed = weights.gathered_bytes / tp, sent_bytes(plan) * weights.trained / tp
    shared = (SUMMED if row.shards else main_bytes(plan)) * weights.trained / tp / n  # of one shard, by replicas
    passes = plan.batch.accumulation
    if "weights" in row.shards:
        gathers = 2 if plan.train.resharding else 1
        volume, calls = passes * (gathers * gathered + summed), passes * (gathers + 1) * shape.layers
    elif "gradients" in row.shards:
        volume, calls = passes * summed + weights.compute * weights.trained / tp, passes * shape.layers
    elif row.shards:
        volume, calls = summed + weights.compute * weights.trained / tp, shape.layers
    else:
        volume, calls = 2 * summed, shape.layers
    sharing = _ring(volume, n, bandwidth(plan, hardware)) + (calls * LATENCY if n > 1 else 0.0)
    # Replicas of one shard are one GPU in each node: all GPUs of a node share its adapters.
    share = hardware.fabric_bandwidth / layout.ranks_per_node
    return sharing + _ring(2 * shared, replicas, share if layout.nodes > 1 else hardware.node_bandwidth)


def _ring(volume: float, ranks: int, gigabytes: float) -> float:
    return volume * (ranks - 1) / ranks / (gigabytes * 1e9)


def bandwidth(plan: Plan, hardware: Hardware) -> float:
    """GB/s of a collective along ``dp``: a ring through several nodes goes at the slower link.

    There are as many such rings as tensor-parallel ranks, and they share a node's adapters.
    """
    if plan.layout.data_inside_nodes:
        return hardware.node_bandwidth
    return min(hardware.node_bandwidth, hardware.fabric_bandwidth / plan.layout.degree("tp"))


def _tensor_traffic(plan: Plan, shape: Shape, hardware: Hardware) -> float:
    """Seconds along the tensor axis in one step; nothing runs behind which it could hide."""
    tp = plan.layout.degree("tp")
    if tp == 1:
        return 0.0
    each = micro_tokens(plan) * shape.hidden * all_weights(plan, shape).compute
    calls = 8 * shape.layers * plan.batch.accumulation
    return _ring(calls * each, tp, hardware.node_bandwidth) + calls * LATENCY


def _host(plan: Plan, shape: Shape, hardware: Hardware, arithmetic: float) -> float:
    """Seconds that offloading adds: gradients down, weights up, the optimizer on the node's cores."""
    row, layout = STRATEGIES[plan.train.strategy], plan.layout
    if not row.offload:
        return 0.0
    weights, shards = all_weights(plan, shape), layout.degree("dp") * layout.degree("tp")
    own = weights.trained / shards
    # Down and up once a step; sharded weights that lie in the node's memory, up for both passes of each micro batch.
    moved = (main_bytes(plan) + weights.compute) * own
    trained = main_bytes(plan) if row.name.startswith("fsdp") else weights.compute
    streamed = (trained * own + weights.frozen_bytes / shards) if "weights" in row.offload else 0.0
    stream = plan.batch.accumulation * 2 * streamed / (hardware.host_bandwidth * 1e9)
    update = max(own / RANK_ADAM, own * layout.ranks_per_node / CPU_ADAM)
    return moved / (hardware.host_bandwidth * 1e9) + _unhidden(stream, arithmetic) + update
