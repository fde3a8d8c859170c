"""How a forward pass is made that is not the policy's own: in evaluation, or of the model as it was before training.

A reference differs from the policy by what was learned and by nothing else: before the first step their answers are
equally likely, to the last bit. Layers that are compiled round where their program does, and one whose adapters are
switched off, or that keeps nothing for a backward pass, is another program. There a reference is the policy's own
program, told to multiply what adapters add by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hpcft.train.head import PROBE_LENGTH
from hpcft.train.skeleton import layers_of
from hpcft.train.world import World

# Times that a model is asked whether it draws numbers, and that the text is as long as PROBE_LENGTH: some draw rarely.
PROBES = 8


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


@contextmanager
def as_before_training(model: Any) -> Iterator[None]:
    """Adapters off, copies of modules_to_save off, and as ``in_evaluation``.

    Where adapters have a factor (``give_factors``), it is nothing meanwhile, and the pass is one of training.

    peft's own ``disable_adapter`` also freezes the adapters and thaws them; a sharded strategy may hold a gathered
    copy of a weight meanwhile, which would stay frozen. So only the switch that a forward pass looks at is turned.
    """
    factored = [module for module in model.modules() if _factors(module)]
    switched = [m for m in model.modules() if getattr(m, "_disable_adapters", None) is False and not _factors(m)]
    given = [_factors(module) for module in factored]
    for module in switched:
        module._disable_adapters = True
    for module, factors in zip(factored, given, strict=True):
        # One for all would be another program: torch makes it for which of its inputs are the same.
        module.scaling.update({name: torch.zeros_like(factor) for name, factor in factors.items()})
    try:
        with nullcontext() if factored else in_evaluation(model):
            yield
    finally:
        for module in switched:
            module._disable_adapters = False
        for module, factors in zip(factored, given, strict=True):
            module.scaling.update(factors)


def give_factors(model: nn.Module, device: torch.device) -> None:
    """From now on what adapters in the layers add is multiplied by a tensor, for which no program is made again.

    Not where that is not all that a layer does of it: DoRA also scales what the layer gave without it.
    """
    for module in (m for layer in layers_of(model) for m in layer.modules()):
        if hasattr(module, "lora_A") and not any(getattr(module, "use_dora", {}).values()):
            module.scaling.update({name: torch.tensor(float(f), device=device) for name, f in module.scaling.items()})


@torch.no_grad()
def repeats_itself(model: nn.Module, world: World) -> bool:
    """Does a pass of training say the same twice, on all ranks? Not where the model draws numbers of its own, for
    dropout or for which experts a token goes to. What adapters drop does not count. To be asked before compiling.
    """
    adapters = [m for name, m in model.named_modules() if "lora_dropout" in name and m.training]
    tokens = torch.arange(PROBE_LENGTH, device=world.device).repeat(PROBES)[None]
    said = []
    for module in adapters:
        module.training = False
    try:
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            for seed in range(PROBES):
                torch.manual_seed(seed)
                said.append(model(input_ids=tokens, use_cache=False).logits)
    finally:
        for module in adapters:
            module.training = True
    return not world.max([float(not all(torch.equal(said[0], other) for other in said))])[0]


def _factors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that multiply what its adapters add."""
    factors = getattr(module, "scaling", None)
    if not hasattr(module, "lora_A") or not isinstance(factors, dict):
        return {}
    return {name: factor for name, factor in factors.items() if isinstance(factor, torch.Tensor)}
