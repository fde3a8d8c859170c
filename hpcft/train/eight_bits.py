"""A frozen linear in 8-bit floats (e4m3), each row of every factor with a scale of its own, accumulated in float32.

    y[n,o] = Σ_i x[n,i] W[o,i]        x ≈ s_n·x8, W ≈ t_o·W8:       y = s_n · t_o · Σ_i x8 W8
    ∂x[n,i] = Σ_o ∂y[n,o] W[o,i]      ∂y·t ≈ u_n·g8:                ∂x = u_n · Σ_o g8 W8

So one copy of the weight serves both passes; the backward one turns it around, a hundredth of its time. Nothing of the
input is kept. On CPUs, and in float32, the same numbers are multiplied in the compute type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max
TINY = 1e-30  # for rows of zeros; gradients are small
TILE = 16  # what the kernels want both sides of a weight to divide by


def fits(linear: nn.Linear) -> bool:
    """Has it sides that the kernels can take?"""
    return linear.in_features % TILE == linear.out_features % TILE == 0


def by_rows(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, m] → 8-bit floats [n, m] and float32 scales [n, 1], whose product is about ``numbers``."""
    wide = numbers.float().contiguous()  # the kernels want rows
    scales = wide.abs().amax(1, keepdim=True).clamp(min=TINY) / LARGEST
    return (wide / scales).to(KIND), scales


class EightBits(nn.Module):
    """In the place of a frozen linear. weight: the bytes, in a tensor of the compute type; scales: float32 [out, 1]."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        rows = linear.weight.numel() // dtype.itemsize
        self.weight = nn.Parameter(torch.empty((rows, 1), dtype=dtype, device="meta"), requires_grad=False)
        self.scales = torch.empty(0)

    def pack(self, whole: torch.Tensor) -> torch.Tensor:
        """The bytes of a weight [out, in]; its scales stay here."""
        bytes_, self.scales = by_rows(whole)
        return bytes_.view(self.weight.dtype).view(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]"""
        y = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        weight = packed.view(KIND).view(len(scales), -1)
        return _multiplied(*by_rows(x), weight.t(), scales.t(), x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        packed, scales = ctx.saved_tensors
        turned = packed.view(KIND).view(len(scales), -1).t().contiguous().t()  # the kernel wants columns in a row
        ones = scales.new_ones(1, turned.shape[1])
        return _multiplied(*by_rows(gradient * scales.t()), turned, ones, gradient.dtype), None, None


def _multiplied(
    a: torch.Tensor, of_rows: torch.Tensor, b: torch.Tensor, of_columns: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[n, m]: 8-bit a [n, k] times 8-bit b [k, m], times the scales of their rows [n, 1] and columns [1, m]."""
    if a.is_cuda and dtype is torch.bfloat16:
        return torch._scaled_mm(a, b, scale_a=of_rows, scale_b=of_columns.contiguous(), out_dtype=dtype)
    return ((a.float() @ b.float()) * of_rows * of_columns).to(dtype)
