"""An adapter merged into its base, with the change that merging and the written type make to the logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcft.plan.plan import Plan
from hpcft.train.quantise import quantise_now
from hpcft.train.reader import Reader
from hpcft.train.weights import (
    EXACT,
    Change,
    Samples,
    Unfaithful,
    Written,
    adapted,
    compare,
    faithful,
    fill,
    is_quantised,
    logits,
    masters_of,
    reloaded_model,
    save_model,
)

WRONG = 1e-3  # share of the largest logit from which on a float32 merge is not rounding but a mistake
USUAL = (
    4  # casts of merged weights were seen to move logits by less than one step of the type, as a share of the largest
)


def write_merged(
    plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples, padding: int | None = None
) -> Written:
    """The adapter merged into the original base in float32, then cast; the base is never a quantised or rounded one.

    Raises Unfaithful where merging moves the logits by more than the order of float32 sums, before any cast.
    """
    quantised_base = _beside_quantised(plan, reader, samples) if is_quantised(plan) else None
    model = adapted(plan, torch.float32)
    fill(model, masters_of(reader), reader)
    trained = logits(model, samples)
    whole = merge(model)
    exact = compare(trained, logits(whole, samples))
    if not exact.share < WRONG:
        raise Unfaithful(
            f"merging in float32 moved a logit by {exact.largest:.3g} of {exact.scale:.3g}: more than rounding explains"
        )
    _round(whole, dtype)
    cast = logits(whole, samples)
    change = compare(trained, cast)
    parameters = save_model(whole.to(dtype), folder, padding)
    del model, whole
    again = compare(cast, logits(reloaded_model(plan, torch.float32, folder), samples))
    faithful(again, EXACT)
    quantised = compare(trained, quantised_base) if quantised_base else None
    return Written(parameters, again, change, quantised, cast_warnings(change, dtype))


def _beside_quantised(plan: Plan, reader: Reader, samples: Samples) -> list[torch.Tensor]:
    """Logits beside the quantised base that the adapter was trained on, everything else in float32."""
    model = adapted(plan, torch.float32)
    fill(model, masters_of(reader), reader)
    quantise_now(model, plan.model.quantization, torch.float32)
    return logits(model, samples)


def merge(model: Any) -> Any:
    """The base model with the adapter inside its weights.

    Embedding and head that share one tensor part ways where only one of them was trained: merged into the shared
    tensor, the change would reach the other one too.
    """
    inner = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    shared = head is not None and _plain(head).weight is _plain(embedding).weight
    if shared and (_plain(head) is not head or _plain(embedding) is not embedding):
        _plain(head).weight = nn.Parameter(_plain(head).weight.detach().clone())
    whole = model.merge_and_unload(safe_merge=True)
    if shared:
        _share_again(whole)
    return whole


def _share_again(whole: Any) -> None:
    """Embedding and head are one tensor where they are still equal; else the configuration says that they are two."""
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False


def _plain(layer: Any) -> Any:
    """The layer itself, without what peft wrapped around it."""
    for name in ("base_layer", "original_module"):
        layer = getattr(layer, name, layer)
    return layer


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Every weight to the nearest number that ``dtype`` has, kept in float32: so the cast is measured, nothing else."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def cast_warnings(change: Change, dtype: torch.dtype) -> tuple[str, ...]:
    """A warning where the written type moves logits more than usual. Raises Unfaithful where they are no numbers."""
    name = str(dtype).removeprefix("torch.")
    if not math.isfinite(change.largest):
        raise Unfaithful(f"the merged weights do not fit into {name}: logits are no numbers; use --dtype float32")
    if change.share <= USUAL * torch.finfo(dtype).eps + EXACT:
        return ()
    return (
        f"casting the merged weights to {name} moves a logit by {change.largest:.3g} of {change.scale:.3g}, more than "
        "is usual for this type; --dtype float32 keeps the trained model",
    )
