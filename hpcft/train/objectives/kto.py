"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): each answer is good or bad by itself; a unit is an answer.

With r(y) = log π(y) − log π_ref(y) over an answer's trained tokens, and z how far the model has moved in general:

    desirable      desirable_weight   · (1 − σ(β (r − z)))
    undesirable    undesirable_weight · (1 − σ(β (z − r)))
    z              max(0, mean of r over the global batch, each prompt with another's answer), without gradient

z is known before the first loss of a step, from a forward pass over all of its micro batches on all ranks, so that
neither accumulation nor ranks change it; ``mismatch`` says which answer is another's. In an evaluation it is of the
whole validation split. TRL takes z per micro batch, so its losses agree only where that is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.modes import in_evaluation
from hpcft.train.preference import Metrics, Rated
from hpcft.train.protocols import DESIRABLE, Batch, Loss, Mean
from hpcft.train.scores import document_scores


def build(plan: ObjectivePlan) -> KahnemanTversky:
    """beta, both weights and the way to the reference are the plan's."""
    return KahnemanTversky(plan)


class KahnemanTversky(Rated):
    """Fulfils ``protocols.Objective``."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """The sum of r over prompts with other answers, and how many they are."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            assert batch.others is not None
            with in_evaluation(model):
                scores = document_scores(model, batch.others, reference=True)
            assert scores.reference is not None
            total = total.to(batch.tokens.device) + (scores.policy - scores.reference).double().sum()
            count += len(batch.kinds)
        return [float(total), float(count)]

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the answers of the micro batch."""
        total, count = known
        kl = max(0.0, total / max(count, 1.0))
        scores = document_scores(model, batch, reference=True)
        assert scores.reference is not None
        ratios = scores.policy - scores.reference
        good = torch.tensor([kind == DESIRABLE for kind in batch.kinds], dtype=torch.bool, device=ratios.device)
        logits = self.plan.beta * torch.where(good, ratios - kl, kl - ratios)
        weights = torch.where(good, self.plan.desirable_weight, self.plan.undesirable_weight)
        value = (weights * (1 - torch.sigmoid(logits))).sum()
        return Loss(value, self._metrics(batch, good, ratios.detach(), scores.policy.detach(), kl))

    def _metrics(
        self, batch: Batch, good: torch.Tensor, ratios: torch.Tensor, policy: torch.Tensor, kl: float
    ) -> Metrics:
        desirable, answers = batch.kinds.count(DESIRABLE), len(batch.kinds)
        rewards, bad = self.plan.beta * ratios, ~good
        return {
            "rewards/chosen": Mean((rewards * good).sum(), desirable),
            "rewards/rejected": Mean((rewards * bad).sum(), answers - desirable),
            "logps/chosen": Mean((policy * good).sum(), desirable),
            "logps/rejected": Mean((policy * bad).sum(), answers - desirable),
            "kl": Mean(torch.full_like(ratios, kl).sum(), answers),
        }
