"""Contrastive preference optimisation (Xu et al. 2024): DPO with a flat reference, and the chosen answer learned.

With log π(y) summed over an answer's trained tokens; a unit is a pair:

    sigmoid   − log σ(β (log π_c − log π_r)), smoothed as in DPO
    hinge     max(0, 1 − β (log π_c − log π_r))
    + cpo_alpha · cross entropy of the chosen answers, a mean over their tokens in the global batch
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.preference import Pairs, chosen_tokens, logistic, pair_metrics, per_pair
from hpcft.train.protocols import Batch, Loss
from hpcft.train.scores import document_scores, pairs


def build(plan: ObjectivePlan) -> Contrastive:
    """loss_type, beta, label_smoothing and cpo_alpha are the plan's."""
    return Contrastive(plan)


class Contrastive(Pairs):
    """Fulfils ``protocols.Objective``."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """Pairs and chosen tokens."""
        return chosen_tokens(batches, texts=False)

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the pairs of the micro batch."""
        policy = document_scores(model, batch).policy
        chosen, rejected = (policy[one] for one in pairs(batch))
        logits = self.plan.beta * (chosen - rejected)
        hinge = self.plan.loss_type == "hinge"
        losses = torch.relu(1 - logits) if hinge else logistic(logits, self.plan.label_smoothing)
        value = losses.sum() - self.plan.cpo_alpha * per_pair(chosen.sum(), known)
        rewards = self.plan.beta * chosen.detach(), self.plan.beta * rejected.detach()
        return Loss(value, pair_metrics(*rewards, chosen, rejected))
