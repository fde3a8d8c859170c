"""Compute types, and the dynamic loss scale that float16 needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class LossScale:
    """float16 gradients below 6e-8 vanish; the loss is multiplied by ``value`` so that they do not.

    An overflow halves the scale and costs the step; ``growth_interval`` good steps in a row double it. In
    bfloat16 and float32 ``dynamic`` is false and the value stays 1.
    """

    value: float = 1.0
    dynamic: bool = False
    good_steps: int = 0
    growth_interval: int = 1000

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScale:
        return cls(2.0**14, dynamic=True) if dtype is torch.float16 else cls()

    @property
    def can_shrink(self) -> bool:
        """False once halving cannot help any more: then the gradients themselves are not finite."""
        return self.dynamic and self.value > 1.0

    def shrink(self) -> None:
        """After an overflow."""
        self.value, self.good_steps = max(self.value / 2, 1.0), 0

    def grow(self) -> None:
        """After a good step."""
        if not self.dynamic:
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.value, self.good_steps = min(self.value * 2, 2.0**24), 0
