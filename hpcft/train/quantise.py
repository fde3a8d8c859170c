"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023: NormalFloat in blocks of 64, whose scales have 8 bits), or 8.

The linears of the decoder layers become bitsandbytes' own, or ``eight_bits``', adapted or not; embedding, head, norms
and adapters stay what they are. The bytes lie in a tensor of the compute type: FSDP2 gathers it as any other weight of
that type, and a cast, which would break the bytes, is never due. The scales stay with the module, whole on every rank:
in 4 bits a sixtieth of a byte for each weight, in 8 four bytes for each row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hpcft.errors import refuse
from hpcft.train import eight_bits
from hpcft.train.skeleton import layers_of

Pack = Callable[[torch.Tensor], torch.Tensor]
HOW: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
# Before anything imports it, as peft does: on some CPUs it tells every run to install kernels that it would download.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quantise(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Pack]:
    """Exchange the frozen linears of the layers for empty ones; name of each weight → what packs its numbers.

    kind: nf4 or fp8. dtype: of compute. device: where numbers are packed. A packer takes the whole weight, leaves the
    scales in its module and returns the bytes. Raises Refusal where bitsandbytes is not installed, or the GPU too old.
    """
    if kind == "fp8":
        _check_eight_bits(device)
    packs: dict[str, Pack] = {}
    for name, linear in _frozen(model):
        if kind == "fp8" and not eight_bits.fits(linear):
            continue
        parent, _, key = name.rpartition(".")
        made: Any = eight_bits.EightBits(linear, dtype) if kind == "fp8" else _four_bits(linear, dtype)
        setattr(model.get_submodule(parent), key, made)
        packs[f"{name}.weight"] = partial(_pack_eight if kind == "fp8" else _pack, made, device)
    return packs


def _check_eight_bits(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise refuse(
            "model.base_precision: this GPU does not multiply 8-bit floats",
            value=torch.cuda.get_device_name(device), choices=("null",), hint="quant_bits: 4 saves more memory",
        )  # fmt: skip


@torch.no_grad()
def _pack_eight(linear: eight_bits.EightBits, device: torch.device, whole: torch.Tensor) -> torch.Tensor:
    return linear.pack(whole.to(device))


def _frozen(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of the layers that are not trained. Exactly linears: what a model derives may compute otherwise."""
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    linears = [(n, m) for n, m in model.named_modules() if id(m) in inside and type(m) is nn.Linear]
    # An adapter that peft has loaded to be used is frozen too, and yet no part of the base.
    return [(name, m) for name, m in linears if not m.weight.requires_grad and "lora_" not in name]


def quantise_now(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """The same for a model that has its numbers already, on the CPU; each weight is let go when it is packed."""
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, pack in quantise(model, kind, dtype, torch.device("cpu")).items():
        packed = pack(whole.pop(name).to(dtype))
        model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(packed, requires_grad=False)


def _four_bits(linear: nn.Linear, dtype: torch.dtype) -> Any:
    """bitsandbytes' linear with the bias of ``linear``; its weight has the shape of the bytes and no numbers."""
    made = bitsandbytes().nn.Linear4bit(
        linear.in_features, linear.out_features, False, dtype, quant_storage=dtype, device="meta", **HOW
    )
    rows = -(-linear.weight.numel() // (2 * dtype.itemsize))
    # A plain parameter, which sharding and moving leave as it is; the forward pass finds the scales in the module.
    made.weight = nn.Parameter(torch.empty((rows, 1), dtype=dtype, device="meta"), requires_grad=False)
    made.bias = linear.bias
    # Or the first evaluation on a CPU would repack the bytes for kernels that know no backward pass and no shards.
    made.support_avx512bf16_for_cpu = False
    return made


@torch.no_grad()
def _pack(linear: Any, device: torch.device, whole: torch.Tensor) -> torch.Tensor:
    quantize: Any = bitsandbytes().functional.quantize_4bit
    packed, linear.quant_state = quantize(whole.to(device), quant_storage=linear.quant_storage, **HOW)
    return packed


def bitsandbytes() -> Any:
    """The package. Raises Refusal with the command that installs it."""
    try:
        import bitsandbytes as package
    except ImportError as error:
        raise refuse(
            f"model.quant_bits: a quantised base needs bitsandbytes, which cannot be imported: {error}",
            value=4,
            hint="pip install bitsandbytes, in the environment that the job uses; or leave out quant_bits",
        ) from error
    return package
