"""Bytes that the forward pass keeps for the backward pass, as transformers' modules and torch's autograd save them.

Counted module by module on Llama's decoder layer, per token, with c bytes of compute type, width h, queries q, keys k
(values are as many), feed-forward f and LoRA rank r. Torch saves a tensor once, however many operations need it.

norm, twice          4h        the float32 copy that the norm is computed in
                     + c·h     its normalised output, when the norm's weight is trained
attention            2c·(q+k)  queries, keys, values and the result, and a float32 sum per head (FlashAttention-2, Dao
                               2023, arXiv 2307.08691, section 3.1); sdpa with a mask repeats keys and values: 4c·q
    eager            (4+c)·heads·S more, S tokens in a row: softmax in float32 and its copy, quadratic in the row
feed-forward         3c·f      gate, its SiLU, up; with experts also c·h for each expert's copy of the token
inputs of linears    c·(2h+f)  both norms' outputs and gate × up, for weight gradients; a frozen weight keeps none
    LoRA             c·r for each adapter; with dropout each has its own dropped input and a mask of a byte

A compiled layer makes what is cheap again: no float32 copies, of the feed-forward gate, up and their product, of
norms input and output: c·(4h + 3f) and the attention, the same for LoRA; with dropout c·(2h + f) less.
"""

from __future__ import annotations

from hpcft.plan.plan import Plan
from hpcft.plan.shape import Shape
from hpcft.plan.weights import COMPUTE_BYTES, adapted

CHUNK_LOGITS = 2**27  # float32 numbers of logits alive at once: half a GiB
TILE = 128  # rows that a matrix product of a GPU works on together
LOGIT_BYTES = 14  # of a number: scores and their gradient in two bytes, logits and two steps to it in float32
COMPILED_LOGIT_BYTES = 8  # the same where each of these is made in one pass
# Moments of a step at one of which a GPU is fullest: when the loss is computed, when the backward pass is in the last
# layer, when it is in the first one, and when the gradients of the ends are summed.
LOSS, BACKWARD, FIRST, ENDS = MOMENTS = ("loss", "backward", "first layer", "ends")


def attention_kind(plan: Plan, shape: Shape) -> str:
    """flash, sdpa or eager: what ``auto`` will find. On AMD the varlen kernel may not run, so sdpa is reckoned with."""
    if plan.model.attention != "auto":
        return {"flash_attention_2": "flash"}.get(plan.model.attention, plan.model.attention)
    able = plan.resources.accelerator == "cuda" and plan.model.dtype != "float32"
    return shape.attention if able or shape.attention == "eager" else "sdpa"


def layer_token_bytes(plan: Plan, shape: Shape) -> int:
    """Bytes per token that a decoder layer keeps when nothing is recomputed, on all tensor-parallel ranks together."""
    c, h = COMPUTE_BYTES[plan.model.dtype], shape.hidden
    whole = _whole_inputs(plan, shape, c)
    if plan.train.compiled:
        experts = c * h * shape.experts_per_token
        dropped = _adapted_inputs(plan, shape, c) if plan.tuner.drops_out else 0  # copies of them are kept instead
        kept = c * (4 * h + 3 * shape.feed_forward) + experts - dropped
        return kept + whole + _attention(plan, shape, c) + _adapters(plan, shape, c)
    norms = 2 * (4 * h + (c * h if plan.tuner.kind == "full" else 0))
    feed = 3 * c * shape.feed_forward + c * h * shape.experts_per_token
    return norms + whole + _attention(plan, shape, c) + feed + _inputs(plan, shape, c)


def _attention(plan: Plan, shape: Shape, c: int) -> int:
    kind = attention_kind(plan, shape)
    if kind == "flash":
        return 2 * c * (shape.query + shape.key) + 4 * shape.heads
    scores = (4 + c) * shape.heads * plan.data.max_length if kind == "eager" else 4 * shape.heads
    return 4 * c * shape.query + scores


def _inputs(plan: Plan, shape: Shape, c: int) -> int:
    """What linear modules keep of their inputs; o_proj's is the attention's result, which is kept already."""
    tuner, h, f = plan.tuner, shape.hidden, shape.feed_forward
    if tuner.kind == "full":
        return c * (2 * h + f)
    own = 0 if plan.tuner.drops_out else _adapted_inputs(plan, shape, c)
    return _adapters(plan, shape, c) + own


def _adapted_inputs(plan: Plan, shape: Shape, c: int) -> int:
    """What goes into adapted linears, o_proj's apart; each once, however many it goes into."""
    down = "down_proj" in adapted(plan.tuner, shape)
    return c * (shape.hidden * _norms_adapted(plan, shape) + shape.feed_forward * down)


def _whole_inputs(plan: Plan, shape: Shape, c: int) -> int:
    """What tensor-parallel ranks keep beside their own parts: behind each norm, all tokens are gathered on each."""
    trained = 2 if plan.tuner.kind == "full" else _norms_adapted(plan, shape)
    return c * shape.hidden * trained * (plan.layout.degree("tp") - 1)


def _norms_adapted(plan: Plan, shape: Shape) -> int:
    """How many of a layer's two norms have an adapted linear behind them."""
    modules = set(adapted(plan.tuner, shape))
    return bool({"q_proj", "k_proj", "v_proj"} & modules) + bool({"gate_proj", "up_proj"} & modules)


def _adapters(plan: Plan, shape: Shape, c: int) -> int:
    """What LoRA's own products keep; dropout's masks and dropped inputs."""
    if plan.tuner.kind == "full":
        return 0
    modules = adapted(plan.tuner, shape)
    dropped = (c + 1) * sum(inputs for inputs, _ in modules.values()) if plan.tuner.drops_out else 0
    return c * plan.tuner.rank * len(modules) + dropped


def kept_layers(plan: Plan, shape: Shape) -> int:
    """Layers that are not recomputed; selective recomputes every other one, the first included."""
    return {"none": shape.layers, "selective": shape.layers // 2, "full": 0}[plan.train.recomputation]


def micro_tokens(plan: Plan) -> int:
    """Tokens of one forward pass, full windows."""
    return plan.batch.micro_windows * plan.data.max_length


def activation_bytes(plan: Plan, shape: Shape, moment: str) -> int:
    """What is kept at that moment, and what passes; tensor parallel ranks share it by sequence and heads.

    Kept layers, and of a recomputed one its input. With the loss, around the last norm its float32 copy and three more.
    In the backward pass a layer that is recomputed whole, in place of the one before it where some are kept, and a
    layer's gradients: about four tensors as wide as the feed-forward and four as the model, half as many in a compiled
    one that has no adapters. Behind the first layer nothing is left.
    """
    c, h = COMPUTE_BYTES[plan.model.dtype], shape.hidden
    kept, layer = kept_layers(plan, shape), layer_token_bytes(plan, shape)
    passing = (2 if plan.train.compiled and plan.tuner.kind == "full" else 4) * c * (shape.feed_forward + h)
    every = kept * layer + (shape.layers - kept) * c * h
    per_token = {
        LOSS: every + (4 + 3 * c) * h,
        BACKWARD: every + (0 if kept else layer) + passing,
        FIRST: layer + passing,
        ENDS: 0,
    }[moment]
    return micro_tokens(plan) * per_token // plan.layout.degree("tp") + _mask(plan, shape)


def _mask(plan: Plan, shape: Shape) -> int:
    """sdpa and eager build one mask of packed windows for all layers: [rows, S, S] of a byte and of c bytes."""
    if attention_kind(plan, shape) == "flash":
        return 0
    return plan.batch.micro_windows * plan.data.max_length**2 * (1 + COMPUTE_BYTES[plan.model.dtype])


def logit_rows(plan: Plan, shape: Shape) -> int:
    """Rows of logits that exist at a time; none where a text is scored at its last token."""
    if plan.scored:
        return 0
    return min(micro_tokens(plan), plan.train.loss_chunk or chunk_rows(shape.vocabulary))


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that exist at a time where a Plan does not say: whole tiles, two for the largest vocabulary."""
    return max(2 * TILE, CHUNK_LOGITS // vocabulary // TILE * TILE)


def logit_bytes(plan: Plan, shape: Shape) -> int:
    """Of one chunk; there is never more than one. Tensor-parallel ranks have some columns each."""
    each = COMPILED_LOGIT_BYTES if plan.train.compiled else LOGIT_BYTES
    return each * logit_rows(plan, shape) * shape.vocabulary // plan.layout.degree("tp")
