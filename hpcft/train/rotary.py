"""Rotary factors that depend on the length of a text are those of a text of max_length tokens.

transformers looks at the longest row of each micro batch, its padding included: longrope takes its long factors for all
rows as soon as one is longer than the model first was trained on, dynamic NTK stretches to that row and remembers it. A
document's loss would depend on what it shares a micro batch with. A model is trained as it later answers texts of up to
max_length tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

PINNED = "pinned"  # a kind that transformers has no rule for, so that it leaves the factors alone
PROBED = 8  # tokens of a short text


@torch.no_grad()
def pin_factors(model: Any, max_length: int, first: bool) -> None:
    """From now on the same for every batch; the configuration, which an export writes, stays as it is.

    first: this rank says what was done.
    """
    said = set()
    for module in model.modules():
        if kinds := _following(module):
            for layer, kind in kinds.items():
                _pin(module, layer, kind, max_length)
            module.rope_type = PINNED if None in kinds else {**module.rope_type, **dict.fromkeys(kinds, PINNED)}
            follows = any(_still_follows(module, layer, max_length) for layer in kinds)
            said |= {(kind, follows) for kind in kinds.values()}
    for kind, follows in sorted(said) if first else ():
        if follows:
            print(
                f"WARNING: rope: this model's {kind} factors follow the longest row of each micro batch: the loss of a "
                "text depends on its company; a max_length of at most what the model first was trained on avoids it",
                file=sys.stderr,
            )
        else:
            print(f"rope: {kind} factors as for texts of {max_length} tokens, in every batch", file=sys.stderr)


def _following(module: Any) -> dict[str | None, str]:
    """Kind of layer → kind of rotary embedding, where transformers looks at lengths; None: all layers have one kind."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = getattr(module, "rope_type", None)
    kinds = kinds if isinstance(kinds, dict) else {None: kinds}
    return {
        layer: kind
        for layer, kind in kinds.items()
        if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) and kind in ROPE_INIT_FUNCTIONS
    }


def _pin(module: Any, layer: str | None, kind: str, max_length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = "inv_freq" if layer is None else f"{layer}_inv_freq"
    numbers, _ = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=max_length, **_of(layer))
    module._buffers[name] = numbers.to(module._buffers[name].device)


def _still_follows(module: Any, layer: str | None, max_length: int) -> bool:
    """Some families reckon with lengths on their own: is a text's beginning another in a text of max_length tokens?"""
    anything = torch.empty(0, device=next(module.buffers()).device)
    positions = torch.arange(max(max_length, PROBED), device=anything.device)[None]
    try:
        short, long = (module(anything, p, **_of(layer)) for p in (positions[:, :PROBED], positions))
    except (IndexError, RuntimeError, TypeError, ValueError):  # it wants positions of another form
        return False
    return not all(torch.equal(a, b[:, :PROBED]) for a, b in zip(short, long, strict=True))


def _of(layer: str | None) -> dict[str, str]:
    return {} if layer is None else {"layer_type": layer}
