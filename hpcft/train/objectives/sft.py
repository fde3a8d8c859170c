"""Supervised fine-tuning: summed next-token cross entropy over the trained tokens, in float32.

Logits of a whole micro batch (tokens × vocabulary in float32) would be the largest tensor of a run. So the head runs
over the trained positions only, chunk by chunk, and each chunk's logits are made again in the backward pass.
A model whose head does more than that is found by a comparison with its own logits, and gets them whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcft.train.attention import document_arguments
from hpcft.train.protocols import Batch, Loss, Windows
from hpcft.train.skeleton import run_inside

CHUNK_LOGITS = 2**27  # float32 numbers of logits alive at once: half a GiB
PROBE_LENGTH = 8


def units(windows: Windows, index: int) -> int:
    """Trained tokens of a window."""
    return windows.trained_tokens(index)


def count(batch: Batch) -> int:
    """Trained tokens of a micro batch."""
    return batch.trained.numel()


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Cross entropy summed over ``batch.trained``; a float32 scalar, still attached to the model when there is none."""
    head = head_of(model, batch.tokens.device)
    arguments = {"input_ids": batch.tokens, "position_ids": batch.positions, **document_arguments(batch)}
    labels = batch.labels.flatten()[batch.trained]
    if head is None:
        logits = model(**arguments, use_cache=False).logits
        return Loss(_cross_entropy(logits.flatten(0, 1)[batch.trained], labels))

    def whole() -> torch.Tensor:
        hidden = head.body(**arguments, use_cache=False).last_hidden_state
        return chunked_cross_entropy(hidden.flatten(0, 1)[batch.trained], labels, head.logits, head.chunk)

    return Loss(run_inside(model, whole))


def chunked_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], chunk: int
) -> torch.Tensor:
    """The sum of token losses. hidden: [n, width]; labels: int64 [n]; ``chunk`` rows of logits exist at a time."""
    total = hidden.sum().float() * 0.0  # keeps a batch without trained tokens in the graph
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, rows, targets, logits, use_reentrant=False)
    return total


def _chunk_loss(
    rows: torch.Tensor, targets: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return _cross_entropy(logits(rows), targets)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True)
class Head:
    """A language model in two parts: ``body`` gives hidden states, ``output`` logits before scaling."""

    body: nn.Module
    output: nn.Module
    multiplier: float
    softcap: float | None
    chunk: int

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocabulary]"""
        scores = self.output(hidden).float() * self.multiplier
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def head_of(model: nn.Module, device: torch.device) -> Head | None:
    """The model's head, tried once against the model's own logits; None where they differ."""
    if model not in _HEADS:
        head = _split(model)
        if head is not None and not _gives_own_logits(model, head, device):
            warnings.warn(
                "the model's head does more than a matrix product: its logits are computed whole", stacklevel=2
            )
            head = None
        _HEADS[model] = head
    return _HEADS[model]


def _split(model: Any) -> Head | None:
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, output = getattr(whole, whole.base_model_prefix, None), whole.get_output_embeddings()
    if body is None or body is whole or output is None:
        return None
    text = body.config.get_text_config()
    multiplier = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return Head(body, output, multiplier, softcap, max(256, CHUNK_LOGITS // text.vocab_size))


@torch.no_grad()
def _gives_own_logits(model: nn.Module, head: Head, device: torch.device) -> bool:
    tokens = torch.arange(PROBE_LENGTH, device=device)[None]
    training = model.training
    model.eval()
    try:
        own = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = lambda: head.body(input_ids=tokens, use_cache=False).last_hidden_state  # noqa: E731
        ours = run_inside(model, lambda: head.logits(hidden()))
    finally:
        model.train(training)
    return torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max()))
