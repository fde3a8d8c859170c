"""Supervised fine-tuning and pre-training: next-token cross entropy, summed over the trained tokens, in float32.

    − Σ log π(token | what stands before it in its document)        a unit is a trained token

What is trained, the assistant's words or everything, the data says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.protocols import Batch, Loss, Windows
from hpcft.train.scores import total_score


def build(plan: ObjectivePlan) -> Supervised:
    """It has no settings."""
    return Supervised()


class Supervised:
    """Fulfils ``protocols.Objective``."""

    def units(self, windows: Windows, index: int) -> int:
        """Trained tokens of a window."""
        return windows.trained_tokens(index)

    def count(self, batch: Batch) -> int:
        """Trained tokens of a micro batch."""
        return batch.trained.numel()

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """A token's loss needs nothing of other tokens."""
        return []

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Cross entropy summed over ``batch.trained``; still attached to the model when there is none."""
        return Loss(-total_score(model, batch))
