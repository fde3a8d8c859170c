"""What a model says of the tokens: their log-probabilities, never with the logits of all of them alive at once.

Each chunk's logits are made again in the backward pass. Where a frozen reference is wanted too, it is the same model
with its adapters switched off, in the same forward pass: strategies gather weights around a whole forward pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcft.train.attention import document_arguments
from hpcft.train.head import head_of
from hpcft.train.protocols import CHOSEN, Batch
from hpcft.train.skeleton import run_inside

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """Log-probabilities of some tokens, float32 [n]; reference: the same of the model without its adapters."""

    policy: torch.Tensor
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class Documents:
    """Sums over each document's trained tokens, float32 [documents]. counts: how many tokens those are.

    reference: of the model as it was before training, without gradients.
    """

    policy: torch.Tensor
    counts: torch.Tensor
    reference: torch.Tensor | None = None


def token_scores(model: nn.Module, batch: Batch, everywhere: bool = False, reference: bool = False) -> Tokens:
    """The scores of the trained tokens; everywhere: of the token after every position, trained or not."""
    labels = batch.tokens.flatten().roll(-1) if everywhere else batch.labels.flatten()[batch.trained]
    at = None if everywhere else batch.trained
    head = head_of(model, batch.tokens.device)
    arguments = {"input_ids": batch.tokens, "position_ids": batch.positions, **document_arguments(batch)}

    def chosen(out: torch.Tensor) -> torch.Tensor:
        return out.flatten(0, 1) if at is None else out.flatten(0, 1)[at]

    def whole() -> torch.Tensor:
        if head is None:
            return _log_probabilities(chosen(model(**arguments, use_cache=False).logits), labels)
        hidden = head.body(**arguments, use_cache=False).last_hidden_state
        return in_chunks(chosen(hidden), labels, head.logits, head.chunk)

    def both() -> tuple[torch.Tensor, torch.Tensor | None]:
        before = None
        if reference:
            with as_before_training(model):
                before = whole()
        return whole(), before

    return Tokens(*(both() if head is None else run_inside(model, both)))


def document_scores(model: nn.Module, batch: Batch, reference: bool = False) -> Documents:
    """The sums over documents. reference: too; those that came with the batch, where they did."""
    tokens = token_scores(model, batch, reference=reference and batch.reference is None)
    return summed(batch, tokens)


def summed(batch: Batch, tokens: Tokens) -> Documents:
    """The scores of ``batch.trained``, document by document."""
    of = batch.documents.flatten()[batch.trained]
    reference = None if tokens.reference is None else per_document(batch, of, tokens.reference)
    if batch.reference is not None:
        reference = torch.tensor(batch.reference, dtype=torch.float32, device=of.device)
    return Documents(
        per_document(batch, of, tokens.policy), per_document(batch, of, torch.ones_like(of).float()), reference
    )


def per_document(batch: Batch, of: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """float32 [documents]: the sum of ``numbers`` [n] where ``of`` [n] names their document; one beyond them: none."""
    sums = torch.zeros(len(batch.kinds) + 1, device=numbers.device, dtype=numbers.dtype)
    return sums.index_add(0, of, numbers)[:-1]


def texts(batch: Batch, everywhere: torch.Tensor) -> torch.Tensor:
    """float32 [documents]: of the scores after every position, the sum over all tokens of a document but its first."""
    of = batch.documents.flatten()
    inside = (of >= 0) & (of == of.roll(-1))
    inside[-1:] = False  # in a batch of one document without padding the last position is followed by the first
    return per_document(batch, torch.where(inside, of, len(batch.kinds)), everywhere)


def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the chosen documents and of their rejected ones, which follow them; int64 [pairs] each."""
    chosen = torch.tensor([i for i, kind in enumerate(batch.kinds) if kind == CHOSEN], dtype=torch.int64)
    chosen = chosen.to(batch.tokens.device, non_blocking=True)
    return chosen, chosen + 1


def in_chunks(hidden: torch.Tensor, labels: torch.Tensor, logits: Logits, chunk: int) -> torch.Tensor:
    """float32 [n]. hidden: [n, width]; labels: int64 [n]; ``chunk`` rows of logits exist at a time."""
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(_chunk, rows, targets, logits, use_reentrant=False) for rows, targets in parts])


def _chunk(rows: torch.Tensor, targets: torch.Tensor, logits: Logits) -> torch.Tensor:
    return _log_probabilities(logits(rows), targets)


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def as_before_training(model: Any) -> Iterator[None]:
    """Adapters off, copies of modules_to_save off, and as ``in_evaluation``.

    peft's own ``disable_adapter`` also freezes the adapters and thaws them; a sharded strategy may hold a gathered
    copy of a weight meanwhile, which would stay frozen. So only the switch that a forward pass looks at is turned.
    """
    switched = [m for m in model.modules() if getattr(m, "_disable_adapters", None) is False]
    for module in switched:
        module._disable_adapters = True
    try:
        with in_evaluation(model):
            yield
    finally:
        for module in switched:
            module._disable_adapters = False


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Dropout off, nothing recomputed, no gradients."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
