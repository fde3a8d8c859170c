"""What a model says of the tokens: their log-probabilities, never with the logits of all of them alive at once.

Where a frozen reference is wanted too, it is the same model with its adapters switched off, in the same forward pass:
strategies gather weights around a whole forward pass only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcft.train.attention import document_arguments
from hpcft.train.cross_entropy import Scaling, log_probabilities
from hpcft.train.head import Head, head_of
from hpcft.train.modes import as_before_training
from hpcft.train.protocols import CHOSEN, Batch
from hpcft.train.skeleton import run_inside


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
    head = head_of(model, batch.tokens.device)

    def policy() -> torch.Tensor:
        return _log_probabilities(head, *_outputs(model, head, batch, everywhere))

    def before() -> torch.Tensor:
        with as_before_training(model):
            outputs = _outputs(model, head, batch, everywhere)
            with torch.no_grad():
                return _log_probabilities(head, *outputs)

    def both() -> Tokens:
        known = before() if reference else None
        return Tokens(policy(), known)

    return both() if head is None else run_inside(model, both)


def total_score(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The sum of the trained tokens' scores, float32; no logits are computed twice for its gradient."""
    head = head_of(model, batch.tokens.device)
    if head is None:
        return _log_probabilities(head, *_outputs(model, head, batch)).sum()
    return run_inside(model, lambda: head.summed(*_outputs(model, head, batch)))


def _log_probabilities(head: Head | None, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [n] of what ``_outputs`` gives."""
    if head is None:
        return log_probabilities(outputs, targets, Scaling())
    return head.log_probabilities(outputs, targets)


def _outputs(
    model: nn.Module, head: Head | None, batch: Batch, everywhere: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, width], logits [n, vocabulary] of a model without a head of its own; targets, int64 [n]."""
    if head is None:
        return _chosen(model(**_inputs(batch), use_cache=False).logits, batch, everywhere)
    return _chosen(head.body(**_inputs(batch), use_cache=False).last_hidden_state, batch, everywhere)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.tokens, "position_ids": batch.positions, **document_arguments(batch)}


def _chosen(out: torch.Tensor, batch: Batch, everywhere: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, …] of [rows, length, …], and the tokens that follow, int64 [n]."""
    if everywhere:
        return out.flatten(0, 1), batch.tokens.flatten().roll(-1)
    return out.flatten(0, 1)[batch.trained], batch.labels.flatten()[batch.trained]


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
