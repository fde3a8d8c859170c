"""How many weights are trained, frozen and quantised, in all and in the unit that is gathered at a time."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.catalog import STRATEGIES
from hpcft.plan.plan import Plan, TunerPlan
from hpcft.plan.shape import Shape

COMPUTE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SUMMED = 4  # bytes of a gradient while it is summed over ranks, but under ddp: float32
# Buffers of a layer's size that its peers read: of two layers' weights, the next beside the one in use, and of the one
# layer's gradients that are sent at a time.
GATHERS, SUMS = 2, 1
# NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3): 4 bits a weight, and for each block of 64 a constant of 8
# bits, whose own constant of 32 bits serves 256 blocks: 4 + 8/64 + 32/(64·256) = 4.127 bits.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
NF4_CONSTANTS = NF4_BYTES - 4 / 8
# Bytes of a quantised weight with its constants, and of the constants alone. fp8: four bytes for a row of thousands.
BYTES: dict[str, tuple[float, float]] = {"none": (0, 0), "nf4": (NF4_BYTES, NF4_CONSTANTS), "fp8": (1.001, 0.001)}


@dataclass(frozen=True)
class Weights:
    """Counts of weights. quantised: those of the frozen ones that are of ``kind``; compute: bytes of the others."""

    trained: int
    frozen: int
    quantised: int
    compute: int
    kind: str = "none"

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen weights as they lie in memory."""
        return self.compute * (self.frozen - self.quantised) + round(BYTES[self.kind][0] * self.quantised)

    @property
    def constants(self) -> int:
        """Of these, the bytes of the quantised weights' constants: they are not sharded."""
        return round(BYTES[self.kind][1] * self.quantised)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all of them as the forward pass uses them, quantised ones as they are kept."""
        return self.compute * self.trained + self.frozen_bytes


def main_bytes(plan: Plan) -> int:
    """Of a trained weight as it is kept, of each of its two moments and of its gradient: they are of one type."""
    return COMPUTE_BYTES[plan.model.main_params_dtype]


def sends_narrow(plan: Plan) -> bool:
    """Are gradients sent in the compute type and added up in float32 where they arrive? FSDP's of a whole model, inside
    a node. Those of adapters may have been summed over micro batches, in float32.
    """
    narrow = COMPUTE_BYTES[plan.model.dtype] < SUMMED
    return _shards_inside_nodes(plan) and plan.tuner.kind == "full" and narrow


def reads_peers(plan: Plan) -> bool:
    """May ranks copy FSDP's layers from each other? Whether their GPUs can is found out there."""
    return _shards_inside_nodes(plan) and not STRATEGIES[plan.train.strategy].offload


def _shards_inside_nodes(plan: Plan) -> bool:
    """Are there parts of FSDP's, and do all of one share a node?"""
    return plan.train.strategy.startswith("fsdp") and plan.layout.data_inside_nodes and plan.layout.degree("dp") > 1


def sent_bytes(plan: Plan) -> int:
    """Of a gradient on its way to the sum over the data ranks."""
    if not STRATEGIES[plan.train.strategy].shards:
        return main_bytes(plan)
    return COMPUTE_BYTES[plan.model.dtype] if sends_narrow(plan) else SUMMED


def layer_weights(plan: Plan, shape: Shape) -> Weights:
    """Of one decoder layer."""
    compute = COMPUTE_BYTES[plan.model.dtype]
    if plan.tuner.kind == "full":
        return Weights(shape.layer, 0, 0, compute)
    linears = shape.linears()
    quantised = sum(i * o for i, o in linears.values()) if plan.model.quantization != "none" else 0
    saved = sum(i * o for name, (i, o) in linears.items() if name in plan.tuner.modules_to_save)
    trained = _adapters(plan.tuner, adapted(plan.tuner, shape)) + saved
    return Weights(trained, shape.layer, quantised, compute, plan.model.quantization)


def root_weights(plan: Plan, shape: Shape) -> Weights:
    """Of everything outside of the layers: embedding, head, last norm."""
    compute = COMPUTE_BYTES[plan.model.dtype]
    if plan.scored:
        return _scored_root(plan, shape, compute)
    if plan.tuner.kind == "full":
        return Weights(shape.root, 0, 0, compute)
    saved = shape.embedding * len({"embed_tokens", "lm_head"} & set(plan.tuner.modules_to_save))
    ends = {"embed_tokens", "lm_head"} & set(plan.tuner.target_modules)
    trained = saved + _adapters(plan.tuner, dict.fromkeys(ends, (shape.hidden, shape.vocabulary)))
    return Weights(trained, shape.root, 0, compute)


def _scored_root(plan: Plan, shape: Shape, compute: int) -> Weights:
    """Embedding, last norm and the score, which is trained in full."""
    frozen = shape.embedding + shape.hidden
    if plan.tuner.kind == "full":
        return Weights(frozen + shape.hidden, 0, 0, compute)
    saved = shape.embedding * ("embed_tokens" in plan.tuner.modules_to_save)
    ends = {"embed_tokens"} & set(plan.tuner.target_modules)
    trained = saved + _adapters(plan.tuner, dict.fromkeys(ends, (shape.hidden, shape.vocabulary)))
    return Weights(trained + shape.hidden, frozen + shape.hidden, 0, compute)


def all_weights(plan: Plan, shape: Shape) -> Weights:
    """Of the model and its adapters."""
    layer, root = layer_weights(plan, shape), root_weights(plan, shape)
    return Weights(
        shape.layers * layer.trained + root.trained,
        shape.layers * layer.frozen + root.frozen,
        shape.layers * layer.quantised,
        layer.compute,
        layer.kind,
    )


def adapted(tuner: TunerPlan, shape: Shape) -> dict[str, tuple[int, int]]:
    """The linear modules of a layer that get an adapter, (inputs, outputs); of unknown words, all of them."""
    linears = shape.linears()
    words = {word.rpartition(".")[2] for word in tuner.target_modules}
    if words <= {*linears, "embed_tokens", "lm_head"}:
        return {name: size for name, size in linears.items() if name in words}
    return linears


def _adapters(tuner: TunerPlan, modules: dict[str, tuple[int, int]]) -> int:
    """A of rank × inputs and B of outputs × rank; DoRA has a magnitude for each output beside them."""
    return sum(tuner.rank * (i + o) + (o if tuner.use_dora else 0) for i, o in modules.values())
