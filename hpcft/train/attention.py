"""Which attention runs, and how it learns where documents end in a packed window.

On a GPU torch's own ``varlen_attn`` is registered with transformers when it really runs there; rows that are one
document each, and always of one length, go through cuDNN's kernel where that runs: about half the time on Hopper.
Everything else is transformers' sdpa, which builds a block mask from positions that restart. That detection is
silently off with a cache or with any mask (documents then attend to each other), so neither is ever passed, and a check
proves it.
"""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from hpcft.errors import refuse
from hpcft.train.protocols import Batch
from hpcft.train.skeleton import body_of, plain, run_inside

VARLEN = "hpcft_varlen"  # behind it what of ABLE it may make use of: hpcft_varlen_grouped_cudnn
DOCUMENT = 16  # tokens of the check's documents
OTHERS = 4  # documents that another is put behind: a router may decide by a hair once or twice, but not each time
# How much of what it says as their continuation may depend on them: in float32, in fewer bits, and there with noise.
LITTLE, LITTLE_ROUNDED, LITTLE_ROUTED = 1e-4, 1e-3, 5e-2
KNOWN: set[str] = set()  # what this release of torch's kernel can be told, for compiled layers found out beforehand
ABLE: set[str] = set()  # what it may make use of, likewise
CUDNN, GROUPED = "cudnn", "grouped"  # dense rows through cuDNN; fewer keys than queries without repeating them
HOPPER = (9, 0)  # compute capability from which cuDNN's kernel is the faster one
WIDEST = 256  # numbers of a head that the kernel takes
FURTHER = ("global_head_dim", "swa_head_dim", "swa_v_head_dim")  # widths of some layers' heads
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
BEYOND = ("s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices")  # what only other kernels know
LEAST_BOUNDS, LEAST_LONGEST = 64, 1024  # what a compiled layer sees of documents, at least


def choose_attention(wanted: str, config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """The name transformers is given: ``wanted``, or for ``auto`` the fastest that runs here for this model."""
    if wanted != "auto":
        return wanted
    fallback = "sdpa" if _knows_sdpa(config) else "eager"
    if device.type != "cuda" or dtype is torch.float32 or not _varlen_fits(config):
        return fallback
    return _fastest(config, dtype, device) or fallback


def for_any_shape(name: str) -> str:
    """Without cuDNN's kernel, which spends most of a second on every new shape; compiled layers see the same ones."""
    return name.removesuffix(f"_{CUDNN}") if name.startswith(VARLEN) else name


def _knows_sdpa(config: Any) -> bool:
    """Soft-capped models of transformers run eager only. A model that it does not know is left to say so itself."""
    return _says(config, "_supports_sdpa")


def _varlen_fits(config: Any) -> bool:
    """Can the kernel say all that this model asks of its attention? Otherwise it keeps sdpa or its own choice.

    It knows neither soft caps, nor sinks, nor dropout, and is given no mask: what a model says by its mask alone, such
    as chunks, chosen tokens or a look ahead, would be lost. transformers says for its own models which ask for less
    than that: they run in sdpa (no sinks) and in flash attention, which sees no mask either.
    """
    if not _knows_sdpa(config) or not _says(config, "_supports_flash_attn"):
        return False
    text = config.get_text_config()
    try:
        asks = [getattr(text, name, None) for name in (*DROPOUTS, "attn_logit_softcapping")]
        ahead = getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision")  # only of images
        return not any(asks) and not ahead and max(_widths(text)) <= WIDEST
    except RuntimeError:  # transformers' answer to a question about the model where its layers differ in that
        return False


def _says(config: Any, flag: str) -> bool:
    """What transformers' class for this configuration says of itself; True where it knows none."""
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(kind, flag, True))


def _widths(text: Any) -> tuple[int, ...]:
    """Of queries and of values, and of those of further kinds of layers: numbers of a head."""
    rotated, other = (getattr(text, f"qk_{part}_head_dim", None) for part in ("rope", "nope"))
    query = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if rotated and other:  # latent attention, whose head_dim is the rotated part alone
        query = rotated + other
    return (query, getattr(text, "v_head_dim", None) or query, *(getattr(text, name, None) or 0 for name in FURTHER))


def _fastest(config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """VARLEN with what works here, each tried by a small forward and backward pass, which is the only honest way to
    ask a kernel; "" where it does not run at all.
    """
    try:
        register_varlen(VARLEN)
        known = {lengths: _tried(config, dtype, device, lengths) for lengths in ((20, 12), (32,))}
    except (ImportError, RuntimeError, TypeError):
        return ""
    if not all(bool(torch.isfinite(t).all()) for found in known.values() for t in found):
        return ""
    name, hopper = VARLEN, torch.cuda.get_device_capability(device) >= HOPPER
    for able, lengths in ((GROUPED, (20, 12)), (CUDNN, (32,))):
        if able == CUDNN and (not hopper or torch.are_deterministic_algorithms_enabled()):
            continue
        register_varlen(f"{name}_{able}")
        try:
            found = _tried(config, dtype, device, lengths)
        except (RuntimeError, TypeError, ValueError):
            continue
        if all(float((a - b).norm()) <= 3e-2 * float(b.norm()) for a, b in zip(found, known[lengths], strict=True)):
            name = f"{name}_{able}"
    register_varlen(name)
    return name


def _tried(config: Any, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The result for a row of such documents, and the gradients of queries, keys and values."""
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
    width, value_width, *_ = _widths(text)
    numbers = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, n, sum(lengths), wide, dtype=dtype, device=device, generator=numbers, requires_grad=True)
        for n, wide in ((heads, width), (groups, width), (groups, value_width))
    )
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    told: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)} if len(lengths) > 1 else {}
    out, _ = varlen(nn.Module(), query, key, value, None, **told)
    return (out, *torch.autograd.grad(out.float().sum(), (query, key, value)))


def register_varlen(name: str) -> None:
    """Make it known to transformers. Without a mask function of that name the model passes no mask.

    name: VARLEN and what of ABLE is to be made use of, for the whole process.
    """
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    KNOWN.update(inspect.signature(varlen_attn).parameters)
    ABLE.clear()
    ABLE.update(name.removeprefix(VARLEN).split("_"))
    AttentionInterface.register(name, varlen)


def varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside documents. query: [rows, heads, length, width]; returns [rows, length, heads, width].

    cu_seq_lens_q: int32, where documents begin in the flattened rows; without it each row is one document. Raises
    Refusal where the model asks for what the kernel does not know: without it, it would be another model.
    """
    from torch.nn.attention.varlen import varlen_attn

    if beyond := [word for word in BEYOND if ignored.get(word) is not None]:
        raise refuse(
            f"attn_impl: this model's attention asks for {beyond[0]}, which {VARLEN} does not know",
            value=VARLEN,
            hint="set attn_impl: eager",
        )
    narrow = value.shape[-1]
    if narrow != query.shape[-1]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = _of_one_width(query, key, value)
    rows, heads, length, width = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        if CUDNN in ABLE and not sliding_window:
            return _dense(query, key, value, scaling)[..., :narrow], None
        cu_seq_lens_q = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in KNOWN:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    else:
        options["is_causal"] = True
    if key.shape[1] != heads:
        if GROUPED in ABLE and "enable_gqa" in KNOWN:
            options["enable_gqa"] = True
        elif GROUPED not in ABLE:  # a release that knows no such word may be able to, nevertheless
            key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    q, k, v = (t.transpose(1, 2).reshape(rows * length, t.shape[1], width) for t in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out.view(rows, length, heads, width)[..., :narrow], None


def _of_one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zeros behind the numbers of the narrower ones: no score changes, and the values' own part of the result is the
    same. Latent attention has wider queries than values; kernels want one width.
    """
    width = max(t.shape[-1] for t in tensors)
    return [nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors]


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Rows that are one document each; as ``varlen``."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        grouped = key.shape[1] != query.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def document_arguments(batch: Batch) -> dict[str, Any]:
    """What kernels for packed rows want besides the positions; transformers' names.

    Empty for rows that are one document each: nothing has to be kept apart in them.
    """
    if not batch.packed or batch.tokens.device.type == "cpu" or all(len(row) == 1 for row in batch.lengths):
        return {}
    starts, longest = document_bounds(batch)
    bounds = torch.tensor(starts, dtype=torch.int32).to(batch.tokens.device, non_blocking=True)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def document_bounds(batch: Batch) -> tuple[list[int], int]:
    """Where documents begin in the flattened rows, and where the last one ends; the length of the longest, or more.

    Of few shapes: as many empty documents follow, and so much longer is the longest, as makes a power of two.
    """
    lengths = [n for row in batch.lengths for n in row]
    starts, longest = [0, *accumulate(lengths)], max(lengths)
    if not batch.few_shapes:
        return starts, longest
    room = _power_of_two(len(starts), LEAST_BOUNDS)
    return starts + starts[-1:] * (room - len(starts)), min(_power_of_two(longest, LEAST_LONGEST), starts[-1])


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


@torch.no_grad()
def check_packing(
    model: Any, config: Any, device: torch.device, dtype: torch.dtype, max_length: int = 2 * DOCUMENT
) -> None:
    """Prove on this very model that a packed document sees nothing of the one before it. Raises Refusal otherwise.

    What a document says behind another must be what it says alone, and not what it says as the other's continuation.
    Where a little is remembered of the one before (a state, a convolution) that would pass for rounding. So it also is
    put behind several others, in the same place of rows of one batch: nothing but what they are then differs, and the
    same numbers must come out. What comes of other numbers in the same computation (experts with more or fewer tokens)
    is seen where the others follow, which no causal model knows of.

    dtype: the type that is computed in. max_length: of a window.
    """
    name, text = config._attn_implementation, config.get_text_config()
    vocabulary, chunk = text.vocab_size, getattr(text, "attention_chunk_size", None)
    if chunk and chunk < max_length and "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise refuse(
            f"packing: this model attends within chunks of {chunk} tokens, which count from where a window begins and "
            "not from where a document does",
            hint=f"set packing: false, or a max_length of {chunk} at most",
        )
    numbers = torch.Generator().manual_seed(0)
    first, second, *others = torch.randint(0, vocabulary, (1 + OTHERS, DOCUMENT), generator=numbers)
    others = [first, *others]
    training = model.training
    model.eval()
    alone = _outputs(model, [[second]], device)[0]
    behind = _outputs(model, [[other, second] for other in others], device)[:, -DOCUMENT:]
    before = _outputs(model, [[second, other] for other in others], device)[:, :DOCUMENT]
    joined = _outputs(model, [[torch.cat([first, second])]], device)[0, -DOCUMENT:]
    model.train(training)
    leak, whole_leak = float((behind[0] - alone).abs().max()), float((joined - alone).abs().max())
    exact = dtype is torch.float32
    rounding = float(alone.abs().max()) * (1e-5 if exact else 3e-2)
    seen, noise, whole = min(_apart(behind)), max(_apart(before)), _size(joined - alone)
    share = LITTLE if exact else LITTLE_ROUNDED if noise == 0.0 else LITTLE_ROUTED
    if (leak > rounding and leak > 0.2 * whole_leak) or seen > max(3 * noise, share * whole):
        raise refuse(
            f"attn_impl: with {name} the documents of a packed window see each other in this model: "
            f"outputs differ by {max(leak, seen):.2g} from those of the document alone",
            value=name,
            hint="set packing: false",
        )


def _size(numbers: torch.Tensor) -> float:
    return float(numbers.square().mean().sqrt())


def _apart(rows: torch.Tensor) -> list[float]:
    """How far each two of them are from each other."""
    return [_size(rows[i] - rows[j]) for i in range(len(rows)) for j in range(i)]


def _outputs(model: Any, rows: list[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """[rows, tokens, numbers] for rows of documents, all of one length."""
    batch = Batch(
        tokens=torch.stack([torch.cat(documents) for documents in rows]).to(device),
        positions=torch.stack([torch.cat([torch.arange(len(d)) for d in documents]) for documents in rows]).to(device),
        labels=torch.empty(0),
        lengths=[[len(d) for d in documents] for documents in rows],
        packed=True,
        trained=torch.empty(0, dtype=torch.int64),
    )
    arguments = {"input_ids": batch.tokens, "position_ids": batch.positions, **document_arguments(batch)}
    if plain(model).get_output_embeddings() is None:  # one score of it all: too little to compare
        return run_inside(model, lambda: body_of(model)(**arguments, use_cache=False).last_hidden_state).float()
    return model(**arguments, use_cache=False).logits.float()
