"""Decoder layers and the arithmetic of loss, sums and optimizer as compiled programs; everything else stays as it is.

A layer's ``forward`` is compiled, and not the module: hooks, by which strategies gather weights and transformers
recomputes, run around it as before. Layers that differ only in their weights share a program. Each shape needs one of
its own, so windows are padded to their full length, and what kernels hear of documents comes in powers of two.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from hpcft.train import adamw, cross_entropy, reduce_scatter
from hpcft.train.skeleton import layers_of
from hpcft.train.world import World

# What attention hears of documents goes through a layer as it is: a program need not be made for each number of it.
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PROGRAMS = 64  # for one piece of code at most, in this thread; beyond them torch would quietly compile no more


def compile_layers(model: Any, world: World) -> bool:
    """From now on; before, a check of a few tokens would have cost a program of its own.

    False where one of the ranks has nothing to compile with: it is said, and everything stays as it is, on all of them.
    """
    reasons = world.gather_text(_hindrance(world.device))
    if hindered := [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why]:
        if world.first:
            print(f"WARNING: torch_compile: nothing is compiled here, which is slower: {hindered[0]}", file=sys.stderr)
        return False
    torch._dynamo.config.recompile_limit = PROGRAMS
    if hasattr(torch.compiler.config, "dynamic_sources"):
        torch.compiler.config.dynamic_sources = ",".join(rf".*\['{name}'\]" for name in DOCUMENTS)
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=False)
    cross_entropy.compile_arithmetic()
    adamw.compile_arithmetic(world.device)
    reduce_scatter.compile_arithmetic()
    return True


def _hindrance(device: torch.device) -> str:
    """Why the smallest program cannot be made, most often for want of a C compiler; "" when it can."""
    try:
        torch.compile(_smallest, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler may raise
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ""


def _smallest(numbers: torch.Tensor) -> torch.Tensor:
    return numbers * 2 + 1
