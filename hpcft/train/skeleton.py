"""A model without its weights, and how the parts that a rank keeps get theirs.

First the model is built on the meta device, with peft's adapters, and cut for tensor parallelism: nothing of this needs
memory. Then a strategy decides what of each parameter this rank keeps, and only that is read.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hpcft.errors import refuse
from hpcft.run.regions import Region, Span
from hpcft.train.parameters import replace_parameters
from hpcft.train.sources import Source


@dataclass
class Skeleton:
    """model: parameters on meta, buffers real. source: where numbers come from. shapes: of the whole parameters.

    regions: what tensor parallelism left of a parameter on this rank; a name that is absent: all of it.
    packs: of parameters that are kept in another form, what makes it of the whole parameter. reading: seconds that
    went into it so far. unread: parameters that no text goes through, of images and sounds: they stay as they are.
    """

    model: nn.Module
    source: Source
    shapes: Mapping[str, tuple[int, ...]]
    regions: Mapping[str, Region] = field(default_factory=dict)
    packs: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    reading: float = 0.0
    unread: frozenset[str] = frozenset()

    def span(self, name: str, offset: int = 0, length: int | None = None) -> Span:
        """``length`` numbers from ``offset`` on of what this rank's tensor group left of a parameter; None: all."""
        whole = Span(self.shapes[name], self.regions.get(name), 0, 0)
        return Span(whole.whole, whole.region, offset, math.prod(whole.shape) if length is None else length)

    def read(self, name: str, out: torch.Tensor, offset: int = 0) -> None:
        """Fill ``out`` with the numbers of a parameter from ``offset`` on, as they are kept."""
        began = time.perf_counter()
        if (pack := self.packs.get(name)) is None:
            self.source.read(name, self.span(name, offset, out.numel()), out.view(-1))
        else:
            whole = torch.empty(self.shapes[name], dtype=out.dtype)
            self.source.read(name, self.span(name), whole.view(-1))
            out.copy_(pack(whole).flatten()[offset : offset + out.numel()].view(out.shape))
        self.reading += time.perf_counter() - began

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the whole parameters that are trained."""
        return {name: self.shapes[name] for name, p in self.model.named_parameters() if p.requires_grad}

    def fill(self, device: torch.device) -> None:
        """Every parameter whole (but for tensor parallelism) and real, on ``device``; buffers too."""
        self.fill_part(self.model, device)
        move_buffers(self.model, device)

    def fill_part(self, part: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """The parameters of one module that are empty still; dtype: their type, when not their own."""
        inside = {id(parameter) for parameter in part.parameters() if parameter.is_meta}
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in inside}

        def filled(name: str, parameter: torch.Tensor) -> torch.Tensor:
            tensor = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
            self.read(name, tensor)
            return tensor

        replace_parameters(self.model, filled, names)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model, or of a peft model of one; of the text, where it knows images too."""
    body = body_of(model)
    for part in (body, getattr(body, "language_model", None)):
        for child in part.children() if isinstance(part, nn.Module) else ():
            if isinstance(child, nn.ModuleList):
                return list(child)
    raise refuse(
        f"model: the layers of {type(plain(model)).__name__} are not found: "
        f"its {type(body).__name__} has no list of them",
        hint="strategy: ddp with torch_compile: false asks for none",
    )


def beyond_text(model: Any) -> frozenset[str]:
    """The parameters that a text alone never meets: those around the language model of one that knows images, too."""
    body = body_of(model)
    others = {id(p) for name in parts_beyond_text(model) for p in getattr(body, name).parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in others)


def parts_beyond_text(model: Any) -> list[str]:
    """The children of the body that a text alone never meets, by name."""
    parts = dict(body_of(model).named_children())
    if "language_model" in parts:
        return [name for name in parts if name != "language_model"]
    return [name for name, part in parts.items() if _perceives(part)]


def _perceives(part: nn.Module) -> bool:
    """Is there an encoder of images or sounds in it? transformers' parts of a kind of their own have configurations."""
    kinds = {type(module.config).__name__.lower() for module in part.modules() if hasattr(module, "config")}
    return any("vision" in kind or "audio" in kind for kind in kinds)


def body_of(model: Any) -> Any:
    """What gives the hidden states of a transformers model, or of a peft model of one."""
    return getattr(plain(model), plain(model).base_model_prefix)


def plain(model: Any) -> Any:
    """The transformers model itself, whose layers may have adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers, which are real from the beginning, to ``device``."""
    for module in model.modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def let_in(model: Any) -> None:
    """Teach the model to run a function inside of its own forward pass: see ``run_inside``."""
    forward = model.forward

    @functools.wraps(forward)
    def dispatch(*args: Any, inside: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if inside is None else inside()

    model.forward = dispatch
    model.lets_in = True


def run_inside(model: Any, function: Callable[[], Any]) -> Any:
    """``function()`` as the forward pass of ``model``, which may call any of its parts.

    Strategies that gather weights do so around the forward pass of the whole model and of its layers; a part that is
    called from outside would meet weights that are not there.
    """
    return model(inside=function) if getattr(model, "lets_in", False) else function()
