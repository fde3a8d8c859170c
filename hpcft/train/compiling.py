"""Decoder layers and the loss's arithmetic as compiled programs; everything around them stays as it is.

A layer's ``forward`` is compiled, and not the module: hooks, by which strategies gather weights and transformers
recomputes, run around it as before. Layers that differ only in their weights share a program. Each shape needs one of
its own, so windows are padded to their full length, and what kernels hear of documents comes in powers of two.
"""

from __future__ import annotations

from typing import Any

import torch

from hpcft.train import cross_entropy
from hpcft.train.skeleton import layers_of

PROGRAMS = 64  # for one piece of code at most, in this thread; beyond them torch would quietly compile no more


def compile_layers(model: Any) -> None:
    """From now on; before, a check of a few tokens would have cost a program of its own."""
    torch._dynamo.config.recompile_limit = PROGRAMS
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=False)
    cross_entropy.compile_arithmetic()
