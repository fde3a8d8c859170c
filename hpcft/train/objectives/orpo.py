"""Odds-ratio preference optimisation (Hong et al. 2024): no reference; a unit is a pair.

With p = exp(mean of log π over an answer's trained tokens) and odds(p) = p / (1 − p):

    − mean of log π over all tokens of the chosen texts − β log σ(log odds(p_c) − log odds(p_r))

Traps: the first term counts the prompt's tokens too and is a mean over tokens of the global batch, not over pairs; and
log(1 − p) of a mean log-probability near 0 needs log1p and expm1, or it is − ∞.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.preference import Pairs, chosen_tokens, pair_metrics, per_pair
from hpcft.train.protocols import Batch, Loss
from hpcft.train.scores import Tokens, pairs, summed, texts, token_scores


def build(plan: ObjectivePlan) -> OddsRatio:
    """beta is the plan's."""
    return OddsRatio(plan)


class OddsRatio(Pairs):
    """Fulfils ``protocols.Objective``."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """Pairs, and tokens of the chosen texts."""
        return chosen_tokens(batches, texts=True)

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the pairs of the micro batch."""
        everywhere = token_scores(model, batch, everywhere=True).policy
        scores = summed(batch, Tokens(everywhere[batch.trained]))
        chosen, rejected = pairs(batch)
        means = scores.policy / scores.counts.clamp(min=1)
        ratio = F.logsigmoid(_log_odds(means[chosen]) - _log_odds(means[rejected]))
        value = -self.plan.beta * ratio.sum() - per_pair(texts(batch, everywhere)[chosen].sum(), known)
        rewards = self.plan.beta * means.detach()
        return Loss(value, pair_metrics(rewards[chosen], rewards[rejected], means[chosen], means[rejected]))


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)), exact for p near 0 and near 1."""
    near_one = log_p > -math.log(2)
    safe = log_p.clamp(max=-1e-7)
    rest = torch.where(near_one, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(safe)))
    return log_p - rest
