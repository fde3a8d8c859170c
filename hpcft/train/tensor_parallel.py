"""Tensor parallelism with sequence parallelism on transformers models as they are (Korthikanti et al. 2022).

Which linears are cut is the model's own plan (``base_model_tp_plan``). Weights become plain local tensors, so FSDP, DDP
and checkpoints see nothing of it but the regions; messages are hooks around the modules:

    embedding   cut by vocabulary           its output summed over the ranks, whole
    layers      first layer: the sequence is cut; norms and residuals work on a rank's part of it
    attention,  gathered at the entrance, heads or columns cut inside, summed and cut again by the
    mlp         row-parallel linear at the exit
    final norm  gathered, for whoever computes a loss from hidden states
    head        cut by vocabulary           a loss sums over the ranks; logits are gathered for whoever asks for them
    score       whole, on the whole text    each rank takes its share of the gradient

One rule for gradients follows: what is not cut (norms, biases after a sum, LoRA's A before and B behind the cut) sees a
part of the sequence or of the columns on each rank, so its gradient is the sum over the tensor ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hpcft.errors import refuse
from hpcft.run.regions import Region
from hpcft.train.cross_entropy import Columns
from hpcft.train.parameters import replace_parameters
from hpcft.train.score import head_of_score
from hpcft.train.skeleton import body_of, plain

COLUMN, ROW = ("colwise", "colwise_gather_output"), ("rowwise", "rowwise_split_input")
# Linears that are several in one; each part is cut by itself. Parts are in units of these configuration values.
FUSED = {
    "qkv_proj": ("num_attention_heads", "num_key_value_heads", "num_key_value_heads"),
    "gate_up_proj": (None, None),
}


def cut(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Region]:
    """Cut ``model`` (weights on meta) over the ranks of ``group``; what is left of each cut parameter, by name.

    Raises Refusal for a model without a plan of its own, or with parts that the plan does not know.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    base, body = plain(model), body_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    regions: dict[str, Region] = {}
    for module, style in _styled(body):
        _share(names[id(module)], module, style, body.config, ranks, rank, regions)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    for module in (embedding, head) if head is not None else (embedding,):
        for kind, parameter in module.named_parameters(recurse=False):  # some heads have a bias
            regions[f"{names[id(module)]}.{kind}"] = Region(0, (_part(parameter.shape[0], ranks, rank),))
    _narrow(model, regions)
    _connect(body, group)
    _connect_vocabulary(embedding, head, body.config.get_text_config().vocab_size, group)
    if head is None:
        head_of_score(model).register_forward_hook(lambda module, args, output: _Share.apply(output, ranks))
    return _first_names(model, regions)


def _styled(body: Any) -> list[tuple[nn.Module, str]]:
    """The linears of the model's plan, each with column or row."""
    plan = dict(getattr(body.config, "base_model_tp_plan", None) or {})
    known = (*COLUMN, *ROW, "replicated_with_grad_allreduce", "embedding_rowwise", "replicate")
    if not plan or any(style not in known for style in plan.values()):
        strange = ", ".join(sorted({str(s) for s in plan.values()} - set(known))) or "no tensor-parallel plan"
        raise refuse(
            f"parallel.tp: {type(body).__name__} has {strange}, which this release does not cut",
            hint="strategy: fsdp, with tp: 1",
        )
    if wide := next((name for name, module in body.named_modules() if _norms_all_heads(module)), ""):
        raise refuse(
            f"parallel.tp: {type(body).__name__} normalises queries over all heads together ({wide}), of which each "
            "tensor rank has some",
            hint="strategy: fsdp, with tp: 1",
        )
    found = []
    for name, module in body.named_modules():
        style = next((s for pattern, s in plan.items() if re.fullmatch(_pattern(pattern), name)), "")
        if style in COLUMN + ROW:
            found.append((module, "column" if style in COLUMN else "row"))
    return found


def _norms_all_heads(module: nn.Module) -> bool:
    weight, width = getattr(getattr(module, "q_norm", None), "weight", None), getattr(module, "head_dim", None)
    return weight is not None and width is not None and weight.numel() > width


def _pattern(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def _share(name: str, module: Any, style: str, config: Any, ranks: int, rank: int, regions: dict[str, Region]) -> None:
    """What this rank keeps of one linear, of its bias and of its adapters."""
    adapted = hasattr(module, "base_layer")
    linear = module.base_layer if adapted else module
    own = f"{name}.base_layer" if adapted else name
    kind, rows, columns = name.rpartition(".")[2], linear.weight.shape[0], linear.weight.shape[1]
    if style == "column":
        region = Region(0, _fused(kind, rows, config, ranks, rank))
        regions[f"{own}.weight"] = region
        if linear.bias is not None:
            regions[f"{own}.bias"] = region
    else:
        region = Region(1, (_part(columns, ranks, rank, name),))
        regions[f"{own}.weight"] = region
    for adapter in getattr(module, "lora_A", {}):
        side = "lora_B" if style == "column" else "lora_A"
        regions[f"{name}.{side}.{adapter}.weight"] = region


def _fused(kind: str, rows: int, config: Any, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The slices of a column-parallel linear's rows: of each fused part its share."""
    units = [getattr(config, unit) if unit else 1 for unit in FUSED.get(kind, (None,))]
    slices, at = [], 0
    for unit in units:
        size = rows * unit // sum(units)
        start, length = _part(size, ranks, rank, kind)
        slices.append((at + start, length))
        at += size
    return tuple(slices)


def _part(size: int, ranks: int, rank: int, even: str = "") -> tuple[int, int]:
    """(start, length) of a rank's part; only a vocabulary may be cut unevenly."""
    if even and size % ranks:
        raise refuse(f"parallel.tp: {even} has {size} columns, which {ranks} ranks do not divide", value=ranks)
    most = -(-size // ranks)
    start = min(rank * most, size)
    return start, min(most, size - start)


def _narrow(model: nn.Module, regions: Mapping[str, Region]) -> None:
    def local(name: str, parameter: torch.Tensor) -> torch.Tensor:
        region = regions.get(name)
        return parameter.data if region is None else parameter.data.new_empty(region.shape(tuple(parameter.shape)))

    replace_parameters(model, local)


def _first_names(model: nn.Module, regions: Mapping[str, Region]) -> dict[str, Region]:
    """Regions of the parameters that have a name of their own: a tied head goes by its embedding's."""
    return {name: regions[name] for name, _ in model.named_parameters() if name in regions}


def _connect(body: Any, group: dist.ProcessGroup) -> None:
    """The hooks between norms, attention and mlp."""
    blocks: dict[int, nn.Module] = {}
    parents = {id(child): parent for parent in body.modules() for child in parent.children()}
    ranks = dist.get_world_size(group)
    for module, style in _styled(body):
        if style == "column":
            blocks[id(parents[id(module)])] = parents[id(module)]
        else:
            _sum_at_exit(module, group)
    for block in blocks.values():
        block.register_forward_pre_hook(partial(_gather_entrance, group), with_kwargs=True)
        _tell_heads(block, ranks)
    layers = next(child for child in body.children() if isinstance(child, nn.ModuleList))
    layers[0].register_forward_pre_hook(partial(_cut_entrance, group), with_kwargs=True)
    _final_norm(body).register_forward_hook(lambda module, args, output: _Gather.apply(output, group))


def _final_norm(body: Any) -> nn.Module:
    """What stands behind the layers: the one other child with weights."""
    kinds = (nn.ModuleList, nn.Embedding)
    rest = [c for c in body.children() if not isinstance(c, kinds) and next(c.parameters(), None) is not None]
    if len(rest) != 1:
        raise refuse(f"parallel.tp: {type(body).__name__} has {len(rest)} parts beside embedding and layers, not one",
                     hint="strategy: fsdp, with tp: 1")  # fmt: skip
    return rest[0]


def _tell_heads(block: Any, ranks: int) -> None:
    """Attention that splits a fused projection by the configuration's counts gets the counts of this rank."""
    if not hasattr(block, "qkv_proj"):
        return
    block.config = copy.copy(block.config)
    block.config.num_attention_heads //= ranks
    block.num_key_value_heads //= ranks


def _sum_at_exit(module: Any, group: dist.ProcessGroup) -> None:
    """The rank's products are summed and the sequence cut again; the bias is added once, behind the sum."""
    linear = module.base_layer if hasattr(module, "base_layer") else module
    linear.forward = lambda x: F.linear(x, linear.weight)

    def summed(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        total = _SumAndCut.apply(output, group)
        return total if linear.bias is None else total + linear.bias

    module.register_forward_hook(summed)


def _connect_vocabulary(embedding: Any, head: Any, vocabulary: int, group: dist.ProcessGroup) -> None:
    vocabulary = max(vocabulary, embedding.num_embeddings)
    start, length = _part(vocabulary, dist.get_world_size(group), dist.get_rank(group))
    if embedding.padding_idx is not None:  # the row whose gradient is dropped; here only if it is in this part
        inside = start <= embedding.padding_idx < start + length
        embedding.padding_idx = embedding.padding_idx - start if inside else None

    def look(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return ((args[0] - start).clamp(0, max(length - 1, 0)),)

    def found(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = module.asked
        mine: torch.Tensor = (tokens >= start) & (tokens < start + length)
        return _Sum.apply(output * mine[..., None], group)

    def remember(module: Any, args: tuple[torch.Tensor]) -> None:
        module.asked = args[0]

    embedding.register_forward_pre_hook(remember)
    embedding.register_forward_pre_hook(look)
    embedding.register_forward_hook(found)
    if head is not None:
        head.columns = Columns(start, length, group)
        head.register_forward_hook(lambda module, args, output: _GatherLogits.apply(output, vocabulary, group))


def _gather_entrance(group: dist.ProcessGroup, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        return (_Gather.apply(args[0], group), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _Gather.apply(kwargs["hidden_states"], group)}


def _cut_entrance(group: dist.ProcessGroup, module: nn.Module, args: Any, kwargs: Any) -> Any:
    length, ranks = args[0].shape[1], dist.get_world_size(group)
    if length % ranks:
        raise RuntimeError(f"a sequence of {length} tokens cannot be cut among {ranks} tensor ranks")
    return (_Cut.apply(args[0], group), *args[1:]), kwargs


def _all_gather(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[rows, n, …] on each rank → [rows, ranks × n, …]."""
    first = part.transpose(0, 1).contiguous()
    whole = first.new_empty(dist.get_world_size(group) * first.shape[0], *first.shape[1:])
    dist.all_gather_into_tensor(whole, first, group=group)
    return whole.transpose(0, 1).contiguous()  # or each linear that reads it would keep a copy of its own


def _reduce_scatter(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[rows, ranks × n, …], summed over the ranks → this rank's [rows, n, …]."""
    first = whole.transpose(0, 1).contiguous()
    part = first.new_empty(first.shape[0] // dist.get_world_size(group), *first.shape[1:])
    dist.reduce_scatter_tensor(part, first, group=group)
    return part.transpose(0, 1).contiguous()


def _mine(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


class _Gather(torch.autograd.Function):
    """Whole sequence from its parts; backwards, the gradients of every rank's columns are summed and cut."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_gather(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(gradient, ctx.group), None


class _SumAndCut(torch.autograd.Function):
    """The sum of every rank's product, of which this rank keeps its part of the sequence."""

    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _reduce_scatter(product, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(gradient, ctx.group), None


class _Cut(torch.autograd.Function):
    """This rank's part of a sequence that every rank has."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _mine(whole, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; everybody's gradient is the same already."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    """What every rank computes of the same numbers: its part of the gradient, which will be summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient / ctx.ranks, None


class _GatherLogits(torch.autograd.Function):
    """[…, this rank's tokens] → […, vocabulary]; every rank computes the same loss of it, so each keeps its columns."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, vocabulary: int, group: dist.ProcessGroup) -> torch.Tensor:
        ranks = dist.get_world_size(group)
        ctx.start, ctx.length = _part(vocabulary, ranks, dist.get_rank(group))
        padded = F.pad(part, (0, -(-vocabulary // ranks) - part.shape[-1]))
        parts = padded.new_empty(ranks * padded.numel())
        if padded.numel():  # a micro batch without trained tokens has none, on any of the ranks
            dist.all_gather_into_tensor(parts, padded.flatten(), group=group)
        return parts.view(ranks, *padded.shape).movedim(0, -2).flatten(-2)[..., :vocabulary]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[..., ctx.start : ctx.start + ctx.length], None, None
