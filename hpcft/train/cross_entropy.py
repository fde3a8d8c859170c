"""Log-probabilities of tokens from a head's scores, and a sum of them whose gradient is made in the forward pass.

    log π(y) = s_y − log Σ_v exp s_v        ∂ log π(y) / ∂s_v = [v = y] − exp(s_v − log Σ_u exp s_u)

Scores have the compute type, everything made of them is float32. Kept for the backward pass are the scores alone. With
tensor parallelism a rank has some columns of the scores; maximum, sum and the target's score go over the ranks, the
scores themselves never (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

Scores = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Columns:
    """Which tokens this rank's scores are of: ``length`` from ``start`` on, of the vocabulary. group: all ranks."""

    start: int
    length: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Scaling:
    """From scores to logits: times ``multiplier``, then held between −``softcap`` and ``softcap`` by a tanh."""

    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, scores: torch.Tensor) -> torch.Tensor:
        """float32"""
        scaled = scores.float()
        scaled = scaled if self.multiplier == 1.0 else scaled * self.multiplier
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def slope(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``gradient``, which is of logits, as that of scores."""
        scaled = gradient if self.multiplier == 1.0 else gradient * self.multiplier
        return scaled if self.softcap is None else scaled * (1 - (logits / self.softcap).square())


def log_probabilities(
    scores: torch.Tensor, targets: torch.Tensor, scaling: Scaling, columns: Columns | None = None
) -> torch.Tensor:
    """float32 [n]. scores: [n, columns of this rank]; targets: int64 [n], of the whole vocabulary."""
    return _LogProbabilities.apply(scores, targets, scaling, columns)


def summed_in_chunks(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: nn.Module,
    scores: Scores,
    scaling: Scaling,
    columns: Columns | None,
    chunk: int,
) -> torch.Tensor:
    """float32 scalar: Σ log π(target). hidden: [n, width]; ``chunk`` rows of scores exist at a time, each once.

    head: whose trained parameters ``scores`` uses. Their gradients and hidden's are made beside the loss, which knows
    them but for the factor that the backward pass brings; so no chunk is computed a second time. Where no gradients are
    wanted it makes them in vain.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    matrix = _matrix_of(head, columns)
    plain = next((at for at, one in enumerate(trained) if one is matrix), -1)
    return _Summed.apply(hidden, targets, scores, scaling, columns, chunk, plain, *trained)


def _matrix_of(head: nn.Module, columns: Columns | None) -> torch.Tensor | None:
    """The weight of a linear module that is nothing else; its gradient is one product. Where it is cut into columns or
    a unit of FSDP, its hooks are passed by.
    """
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    hooked = not isinstance(head, FSDPModule) and columns is None and (head._forward_hooks or head._forward_pre_hooks)
    return None if hooked else head.weight


def add_product(whole: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """whole += a·b in float32, in one kernel where there is one: a product of its own would be rounded, and added by
    another pass over all of it. whole: float32 [n, m]; a: [n, k]; b: [k, m].
    """
    if whole.is_cuda and a.dtype is torch.bfloat16 and _adds_products(whole.device):
        torch.addmm(whole, a, b, out_dtype=torch.float32, out=whole)
    else:
        whole += a @ b


@lru_cache
def _adds_products(device: torch.device) -> bool:
    """Can this release of torch, on this device? Tried once on small numbers."""
    a, b = (torch.arange(256, device=device).view(16, 16).remainder(7).bfloat16() for _ in range(2))
    whole = torch.ones(16, 16, device=device)
    try:
        torch.addmm(whole, a, b, out_dtype=torch.float32, out=whole)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(whole, 1 + a.float() @ b.float())


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, targets: torch.Tensor, scaling: Scaling, columns: Columns | None
    ) -> torch.Tensor:
        picked, normaliser = _numbers(scores, targets, scaling, columns)
        ctx.save_for_backward(scores, targets, normaliser)
        ctx.scaling, ctx.columns = scaling, columns
        return picked - normaliser

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        scores, targets, normaliser = ctx.saved_tensors
        return _gradient(scores, targets, normaliser, ctx.scaling, ctx.columns, gradient[:, None]), None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scores: Scores,
        scaling: Scaling,
        columns: Columns | None,
        chunk: int,
        plain: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        asked = [parameter for at, parameter in enumerate(trained) if at != plain]
        of_hidden, of_trained = torch.empty_like(hidden), [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for rows, labels, into in zip(*(tensor.split(chunk) for tensor in (hidden, targets, of_hidden)), strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                made = scores(rows)
            picked, normaliser = _numbers(made.detach(), labels, scaling, columns)
            total += (picked - normaliser).sum()
            slope = _gradient(made.detach(), labels, normaliser, scaling, columns, 1.0)
            first, *others = torch.autograd.grad(made, [rows, *asked], slope, materialize_grads=True)
            into.copy_(first)
            parts = iter(others)
            for at, whole in enumerate(of_trained):  # in float32: each of dozens of sums would round anew
                if at == plain:
                    add_product(whole, slope.t(), rows.detach())
                else:
                    whole += next(parts)
        ctx.gradients, ctx.types = [of_hidden, *of_trained], [hidden.dtype, *(p.dtype for p in trained)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this sum have been used already")
        made, ctx.gradients = ctx.gradients, None
        of_hidden, *of_trained = (one.mul_(gradient).to(kind) for one, kind in zip(made, ctx.types, strict=True))
        return of_hidden, None, None, None, None, None, None, *of_trained


def compile_arithmetic() -> None:
    """From now on what is made of scores is a compiled program: one pass over them where there were several."""
    global _numbers, _gradient
    _numbers = torch.compile(_numbers, dynamic=True)
    _gradient = torch.compile(_gradient, dynamic=True)


def _numbers(
    scores: torch.Tensor, targets: torch.Tensor, scaling: Scaling, columns: Columns | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n] each: the target's logit, and the logarithm of the sum of all logits' exponentials."""
    logits = scaling.logits(scores)
    if columns is None:
        return logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(1)
    if not logits.shape[0]:  # a micro batch without trained tokens has no scores, on any of the ranks
        return logits.new_zeros(0), logits.new_zeros(0)
    lowest = logits.new_full((len(logits), 1), -torch.inf)  # a rank may have no columns at all
    most = torch.cat([logits, lowest], 1).amax(1)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=columns.group)
    here, inside = _local(targets, columns)
    of_target = logits.gather(1, here)[:, 0].where(inside, 0.0) if columns.length else torch.zeros_like(most)
    sums = torch.stack([(logits - most[:, None]).exp().sum(1), of_target])
    dist.all_reduce(sums, group=columns.group)
    return sums[1], most + sums[0].log()


def _gradient(
    scores: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    scaling: Scaling,
    columns: Columns | None,
    factor: torch.Tensor | float,
) -> torch.Tensor:
    """``factor`` × ∂ log π(target) / ∂ scores, of the scores' type and shape."""
    logits, here, inside = scaling.logits(scores), targets[:, None], None
    if columns is not None:
        here, inside = _local(targets, columns)
    slope = scaling.slope(logits, -(logits - normaliser[:, None]).exp() * factor).to(scores.dtype)
    if columns is None or columns.length:
        own = logits.gather(1, here)
        # Not 1 − p of a rounded p: near the end of training all of the gradient is in that difference.
        right = scaling.slope(own, (1 - (own - normaliser[:, None]).exp()) * factor).to(scores.dtype)
        slope.scatter_(1, here, right if inside is None else right.where(inside[:, None], slope.gather(1, here)))
    return slope


def _local(targets: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [n, 1]: each target's column here, any one where it is another rank's; bool [n]: which are here."""
    at = targets - columns.start
    return at.clamp(0, max(columns.length - 1, 0))[:, None], (at >= 0) & (at < columns.length)
