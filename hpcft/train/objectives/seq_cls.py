"""Classification of whole texts: cross entropy between the scores at a text's last token and its class.

    − log softmax(s)_class        a unit is a text

The scores are transformers' for sequence classification, one for each class; they and the loss are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.protocols import LABELLED, Batch, Loss, Mean, Windows
from hpcft.train.score import text_scores


def build(plan: ObjectivePlan) -> Classification:
    """It has no settings; how many classes there are, the model's head knows."""
    return Classification()


class Classification:
    """Fulfils ``protocols.Objective``."""

    def units(self, windows: Windows, index: int) -> int:
        """Texts of a window."""
        return windows.count(index, (LABELLED,))

    def count(self, batch: Batch) -> int:
        """Texts of a micro batch."""
        return batch.kinds.count(LABELLED)

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """A text's loss needs nothing of other texts."""
        return []

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """The sum over the texts, and how many of them got their own class."""
        scores = text_scores(model, batch)
        classes = torch.tensor(batch.margins).long().to(scores.device, non_blocking=True)
        right = (scores.detach().argmax(-1) == classes).double()
        return Loss(F.cross_entropy(scores, classes, reduction="sum"), {"accuracy": Mean(right.sum(), len(right))})
