"""Exchanging a model's parameters for others: without memory, cut, or filled."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn


def replace_parameters(
    model: nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor], only: Collection[str] | None = None
) -> None:
    """Give every parameter the tensor ``make(name, parameter)``; what modules share stays shared.

    name: as ``named_parameters`` has it, the first one of a shared parameter. only: the names to touch; None: all.
    """
    names = {id(p): name for name, p in model.named_parameters() if only is None or name in only}
    made: dict[int, nn.Parameter] = {}
    before = list(model.parameters())  # kept until the end: an id must not be given to another
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) not in names:
                continue
            if id(parameter) not in made:
                tensor = make(names[id(parameter)], parameter)
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]
    del before


def without_memory(model: nn.Module) -> None:
    """Every parameter on the meta device: shape and type, no numbers. What is trained is float32, as its masters."""

    def empty(name: str, parameter: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if parameter.requires_grad else parameter.dtype
        return torch.empty(parameter.shape, dtype=dtype, device="meta")

    replace_parameters(model, empty)


def ghosts(model: nn.Module) -> None:
    """Every parameter as one zero, seen as often as it has numbers: on the CPU, without its memory.

    What is built on such a model, as peft builds adapters, is real; what it reads of the model is not.
    """
    replace_parameters(model, lambda name, p: torch.zeros((), dtype=p.dtype).expand(p.shape))
