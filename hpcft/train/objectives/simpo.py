"""Simple preference optimisation (Meng et al. 2024): log-probabilities per token, no reference; a unit is a pair.

With n the trained tokens of an answer:

    − log σ(β / n_c · log π_c − β / n_r · log π_r − γ), smoothed as in DPO; γ is simpo_gamma

Traps: γ is subtracted as it is, not times β. Other trainers add the chosen answers' cross entropy unless they are told
not to; here cpo_alpha adds it where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.preference import Pairs, chosen_tokens, logistic, pair_metrics, per_pair
from hpcft.train.protocols import Batch, Loss
from hpcft.train.scores import document_scores, pairs


def build(plan: ObjectivePlan) -> SimplePreference:
    """beta, simpo_gamma, label_smoothing and cpo_alpha are the plan's."""
    return SimplePreference(plan)


class SimplePreference(Pairs):
    """Fulfils ``protocols.Objective``."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """For cpo_alpha: pairs and chosen tokens."""
        return chosen_tokens(batches, texts=False) if self.plan.cpo_alpha else []

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the pairs of the micro batch."""
        scores = document_scores(model, batch)
        means = scores.policy / scores.counts.clamp(min=1)
        chosen, rejected = pairs(batch)
        rewards = self.plan.beta * means
        logits = rewards[chosen] - rewards[rejected] - self.plan.simpo_gamma
        value = logistic(logits, self.plan.label_smoothing).sum()
        if self.plan.cpo_alpha:
            value = value - self.plan.cpo_alpha * per_pair(scores.policy[chosen].sum(), known)
        rewards = rewards.detach()
        return Loss(value, pair_metrics(rewards[chosen], rewards[rejected], means[chosen], means[rejected]))
