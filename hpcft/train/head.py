"""The output head of a language model apart from its body, so that logits need not exist for all tokens at once.

Logits of a whole micro batch (tokens × vocabulary in float32) would be the largest tensor of a run. So the head runs
over chosen positions only, chunk by chunk. A model whose head does more than a matrix product is found by a comparison
with its own logits, and gets them whole.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hpcft.train.skeleton import plain, run_inside

CHUNK_LOGITS = 2**27  # float32 numbers of logits alive at once: half a GiB
PROBE_LENGTH = 8


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


HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def head_of(model: nn.Module, device: torch.device) -> Head | None:
    """The model's head, tried once against the model's own logits; None where they differ."""
    if model not in HEADS:
        head = _split(model)
        if head is not None and not _gives_own_logits(model, head, device):
            warnings.warn(
                "the model's head does more than a matrix product: its logits are computed whole", stacklevel=2
            )
            head = None
        HEADS[model] = head
    return HEADS[model]


def _split(model: Any) -> Head | None:
    whole = plain(model)
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
