"""The arithmetic of a row: FLOP of a token, MFU, the roofline, medians, agreement of losses. No torch.

MFU here is causal: 6·N for full tuning, 4·N for LoRA (a frozen weight has no gradient), and three passes of causal
attention, over the documents as they are and not over the window that they are packed into. N are the weights that a
token is multiplied with, the head's too. What is computed a second time is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.plan.hardware import PEAK_TFLOPS
from hpcft.plan.shape import Shape

US = 1e6  # microseconds of a second


@dataclass(frozen=True)
class Work:
    """What is done to one token. span: the mean of n² over the mean of n of the documents' lengths n (their own length
    where all are alike): how far back a token's attention reaches is half of it.

    rank: of the adapters, 0 for full tuning. reference: a second forward pass without gradients (dpo). tokens: of an
    optimizer step on one GPU; micro: of a forward pass; shards: GPUs that share the optimizer's states.
    """

    shape: Shape
    span: float
    rank: int = 0
    quantised: bool = False
    reference: bool = False
    trained: float = 1.0  # share of the tokens that carry loss
    tokens: int = 65536
    micro: int = 8192
    shards: int = 1


def span(lengths: Sequence[int]) -> float:
    """Σ n² / Σ n."""
    return sum(n * n for n in lengths) / sum(lengths)


def linear_weights(shape: Shape) -> int:
    """N: the weights of the layers' matrices and of the head."""
    matrices = sum(inputs * outputs for inputs, outputs in shape.linears().values())
    return shape.layers * matrices + shape.embedding


def attention_flop(shape: Shape, span: float) -> float:
    """Of one token's forward pass through causal attention, all layers."""
    return 2.0 * shape.layers * shape.query * span


def token_flop(work: Work, attention: bool = True) -> float:
    """FLOP that one token costs in training, on one GPU of its own. attention False: the matrices alone."""
    passes = (6 if not work.rank else 4) + (2 if work.reference else 0)
    times = 3 + (1 if work.reference else 0)
    whole = passes * linear_weights(work.shape)
    return whole + (times * attention_flop(work.shape, work.span) if attention else 0.0)


def mfu(work: Work, tokens_per_second: float, gpu: str, attention: bool = True) -> float | None:
    """Share of the data sheet's bf16 peak, of one GPU's tokens/s; None for a device that is in no table."""
    peak = PEAK_TFLOPS.get(gpu)
    return token_flop(work, attention) * tokens_per_second / (peak * 1e12) if peak else None


# The roofline: what a faultless program of plain bf16 kernels takes for a token on an H100, part by part. Its constants
# are measured kernels of others; three published results of NVIDIA's all stand at 0.87 to 0.89 of it.
GEMM_TFLOPS = ((5e9, 690.0), (1e9, 640.0), (0.0, 580.0))  # N above which a shape's matrices reach this
# FlashAttention-3, forward and backward TFLOP/s, from the span on; of heads 128 wide, and of narrower ones.
ATTENTION_TFLOPS = ((6144, 640.0, 480.0), (3072, 600.0, 420.0), (1536, 560.0, 316.0), (0, 364.0, 181.0))
NARROW_TFLOPS = ((3072, 420.0, 300.0), (0, 330.0, 220.0))
BACKWARD = 2.5  # of attention's forward FLOP
HBM_BYTES = {"h100": 3.0e12, "h200": 4.3e12}  # copied in a second
ADAPTER_TFLOPS = 150.0  # of the thin products of adapters
NORMS, GATES = 24, 7.75  # numbers of hidden size, and of inner size, that fused elementwise kernels move in a layer
ADAPTER_PASSES = 4  # times that an adapter's inputs and outputs are read or written
LOSS_BYTES = 8  # for each word of the vocabulary, of a trained token
OPTIMIZER_BYTES = 34  # of a trained weight: masters, moments, gradient, copy
NF4_BYTES = 2.55  # of a weight in 4 bits, made two bytes, in each pass


def roofline(work: Work, gpu: str) -> dict[str, float]:
    """Microseconds of one token on one GPU, by part. gpu: h100 or h200; others are taken for an h100."""
    shape, hbm = work.shape, HBM_BYTES.get(gpu, HBM_BYTES["h100"])
    weights, attention = linear_weights(shape), attention_flop(shape, work.span)
    gemm = next(rate for least, rate in GEMM_TFLOPS if weights >= least)
    table = ATTENTION_TFLOPS if shape.head_dim >= 128 else NARROW_TFLOPS
    forward, backward = next((f, b) for least, f, b in table if work.span >= least)
    forwards = 2 if work.reference else 1
    parts = {
        "gemm": token_flop(work, attention=False) / (gemm * 1e12),
        "attention": attention * (forwards / forward + BACKWARD / backward) / 1e12,
        "elementwise": shape.layers * (NORMS * shape.hidden + GATES * shape.inner) * 2 / hbm,
        "loss": work.trained * LOSS_BYTES * shape.vocabulary * forwards / hbm,
        "optimizer": OPTIMIZER_BYTES * trained_weights(work) / work.shards / hbm / work.tokens,
    }
    if work.rank:
        linears = shape.linears()
        shared = {name: i for name, (i, _) in linears.items() if name not in ("k_proj", "v_proj", "up_proj")}
        moved = sum(shared.values()) + sum(outputs for _, outputs in linears.values())
        traffic = ADAPTER_PASSES * moved * 2 * shape.layers / hbm
        parts["adapters"] = traffic + 6 * trained_weights(work) / (ADAPTER_TFLOPS * 1e12)
    if work.quantised:
        parts["four bits"] = 2 * NF4_BYTES * (weights - shape.embedding) / hbm / work.micro
    return {name: seconds * US for name, seconds in parts.items()}


def trained_weights(work: Work) -> int:
    """All of them, or those of adapters on every linear of the layers."""
    if not work.rank:
        return work.shape.parameters
    return work.rank * work.shape.layers * sum(i + o for i, o in work.shape.linears().values())


def roofline_speed(work: Work, gpu: str) -> float:
    """Tokens/s of one GPU at the roofline."""
    return US / sum(roofline(work, gpu).values())


def percentile(numbers: Sequence[float], share: float) -> float:
    """The smallest of the numbers that at least ``share`` of them do not exceed."""
    ordered = sorted(numbers)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


COMPARED = 5  # first optimizer steps


@dataclass(frozen=True)
class Tolerance:
    """Relative, of losses and of gradient norms; of the first step, and of the others that are compared."""

    first: tuple[float, float]
    later: tuple[float, float]


# bfloat16 keeps eight bits, and kernels sum in other orders.
SAME = Tolerance((2e-3, 0.03), (2e-3, 0.03))
# A pair's reward is a small difference of sums of hundreds of log-probabilities: once weights have moved, it is rounded
# by 0.05 until something is learned. TRL's own two rows come apart by 1 % and 5 % in five steps.
OF_PAIRS = Tolerance((2e-3, 0.01), (0.05, 0.05))


def disagreement(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], tolerance: Tolerance = SAME
) -> str:
    """What is wrong between two contestants' first losses and gradient norms; "" when they are the same training.

    ours, theirs: (losses, norms), at least one step each. A peer without norms (nan) is compared by its losses.
    """
    for which, name in enumerate(("loss", "gradient norm")):
        steps = list(zip(ours[which][:COMPARED], theirs[which][:COMPARED], strict=False))
        if not steps:
            return f"no {name} to compare"
        for number, (a, b) in enumerate(steps, start=1):
            if name != "loss" and math.isnan(b):
                continue
            allowed = (tolerance.first if number == 1 else tolerance.later)[which]
            if not abs(a - b) <= allowed * abs(a):
                return f"{name} of step {number}: {b:.4f}, ours {a:.4f}"
    return ""


def least_bytes(work: Work, forward_tokens: int, masters: bool = True) -> float:
    """Bytes that a GPU cannot do without when nothing is recomputed: weights and their states, and for each token of a
    forward pass what the backward pass needs of the layers. masters False: weights and moments of two bytes."""
    shape = work.shape
    trained = trained_weights(work) * (16 if masters else 8) / work.shards
    linear = work.shape.layers * sum(i * o for i, o in shape.linears().values())
    frozen = 0.0
    if work.rank:
        frozen = 0.55 * linear + 2 * shape.root if work.quantised else 2.0 * shape.parameters
    each = (6 * shape.hidden + shape.query + 2 * shape.key + 3 * shape.inner) * 2 * shape.layers
    return trained + frozen + each * forward_tokens
