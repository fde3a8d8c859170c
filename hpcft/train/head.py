"""The output head of a language model apart from its body, so that logits need not exist for all tokens at once.

Logits of a whole micro batch (tokens × vocabulary in float32) would be the largest tensor of a run. So the head runs
over chosen positions only, chunk by chunk. A model whose head does more than a matrix product is found by a comparison
with its own logits, and gets them whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from hpcft.plan.activations import chunk_rows
from hpcft.train.cross_entropy import Columns, Scaling, log_probabilities, summed_in_chunks
from hpcft.train.skeleton import plain, run_inside

PROBE_LENGTH = 8


@dataclass(frozen=True)
class Head:
    """A language model in two parts: ``body`` gives hidden states, ``output`` scores, ``scaling`` makes them logits.

    chunk: how many rows of scores exist at a time. columns: of which tokens they are here; None: of all.
    """

    body: nn.Module
    output: nn.Module
    scaling: Scaling
    chunk: int
    columns: Columns | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocabulary]"""
        return self.scaling.logits(self.output(hidden))

    def log_probabilities(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32 [n]. hidden: [n, width]; targets: int64 [n]. Each chunk is computed again in the backward pass."""
        return self._entered(self._in_chunks, hidden, targets)

    def summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Their sum, float32; each chunk is computed once where that can be."""
        if not torch.is_grad_enabled() or not self._at_once(hidden):
            return self.log_probabilities(hidden, targets).sum()
        return self._entered(self._summed_in_chunks, hidden, targets)

    def _in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        def of(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return log_probabilities(self._scores(rows), labels, self.scaling, self.columns)

        parts = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])

    def _summed_in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_in_chunks(hidden, targets, self.output, self._scores, self.scaling, self.columns, self.chunk)

    def _entered(self, chunks: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """``chunks(*inputs)`` as one forward pass of ``output`` where FSDP gathers its weights around that: in a pass
        for each chunk, it would send their gradients after each.
        """
        if not self._is_unit():
            return chunks(*inputs)
        self.output.forward = chunks
        try:
            return self.output(*inputs)
        finally:
            del self.output.forward  # its class's is there again

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, columns of this rank]: tensor parallelism's hook, which gathers the others', is passed by."""
        if self._is_unit():
            return type(self.output).forward(self.output, hidden)
        return self.output(hidden) if self.columns is None else self.output.forward(hidden)

    def _is_unit(self) -> bool:
        return isinstance(self.output, FSDPModule)

    def _at_once(self, hidden: torch.Tensor) -> bool:
        """Not where DeepSpeed takes the weights away after each use; nor in float16, before its scale is applied."""
        return hidden.dtype is not torch.float16 and not any(hasattr(p, "ds_id") for p in self.output.parameters())


HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def head_of(model: nn.Module, device: torch.device, chunk: int = 0) -> Head | None:
    """The model's head, tried once against the model's own logits; None where they differ.

    chunk: rows of scores that exist at a time; 0: as many as the vocabulary's size allows. It counts when first asked.
    """
    if model not in HEADS:
        head = _split(model, chunk)
        if head is not None and not _gives_own_logits(model, head, device):
            warnings.warn(
                "the model's head does more than a matrix product: its logits are computed whole", stacklevel=2
            )
            head = None
        HEADS[model] = head
    return HEADS[model]


def fewer_at_a_time(model: nn.Module) -> None:
    """From now on, as many rows of scores as the vocabulary's size allows, where there were more."""
    if head := HEADS.get(model):
        usual = chunk_rows(head.body.config.get_text_config().vocab_size)
        HEADS[model] = replace(head, chunk=min(head.chunk, usual))


def _split(model: Any, chunk: int) -> Head | None:
    whole = plain(model)
    body, output = getattr(whole, whole.base_model_prefix, None), whole.get_output_embeddings()
    if body is None or body is whole or output is None:
        return None
    text = body.config.get_text_config()
    multiplier = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    scaling = Scaling(multiplier, getattr(text, "final_logit_softcapping", None))
    columns = getattr(output, "columns", None)
    return Head(body, output, scaling, chunk or chunk_rows(text.vocab_size), columns)


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
