"""Direct preference optimisation (Rafailov et al. 2023): prefer the chosen answer by more than the model at its start.

With log π(y) summed over an answer's trained tokens, and r(y) = log π(y) − log π_ref(y); a unit is a pair:

    sigmoid        − log σ(β (r_c − r_r)); label_smoothing ε: (1 − ε) of it + ε of the reverse (Mitchell 2023)
    robust         ((1 − ε) · forward − ε · reverse) / (1 − 2ε)                             (Chowdhury et al. 2024)
    hinge          max(0, 1 − β (r_c − r_r))                                                   (Zhao et al. 2023)
    ipo            (r_c / n_c − r_r / n_r − 1 / 2β)²                                            (Azar et al. 2023)
    sigmoid_norm   − log σ(β (r_c / n_c − r_r / n_r))
    apo_zero       1 − σ(β r_c) + σ(β r_r)                                                (D'Oosterlinck et al. 2024)

rpo_alpha adds the chosen answers' cross entropy, a mean over their tokens in the global batch (Pang et al. 2024).
Traps: TRL 1.16 no longer smooths ``sigmoid``; ipo without the division by lengths n rewards short answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.preference import Pairs, chosen_tokens, logistic, pair_metrics, per_pair
from hpcft.train.protocols import Batch, Loss
from hpcft.train.scores import document_scores, pairs

# beta, label_smoothing, rewards / beta of chosen and rejected → loss of each pair
Formula = Callable[[float, float, torch.Tensor, torch.Tensor], torch.Tensor]


def build(plan: ObjectivePlan) -> DirectPreference:
    """loss_type, beta, label_smoothing, rpo_alpha and the way to the reference are the plan's."""
    return DirectPreference(plan)


class DirectPreference(Pairs):
    """Fulfils ``protocols.Objective``."""

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """For rpo_alpha: pairs and chosen tokens."""
        return chosen_tokens(batches, texts=False) if self.plan.rpo_alpha else []

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the pairs of the micro batch."""
        scores = document_scores(model, batch, reference=True)
        chosen, rejected = pairs(batch)
        assert scores.reference is not None
        ratios = scores.policy - scores.reference
        rewards = self.plan.beta * ratios.detach()
        if self.plan.loss_type in PER_TOKEN:
            ratios = ratios / scores.counts.clamp(min=1)
        formula = FORMULAS[self.plan.loss_type]
        value = formula(self.plan.beta, self.plan.label_smoothing, ratios[chosen], ratios[rejected]).sum()
        if self.plan.rpo_alpha:
            value = value - self.plan.rpo_alpha * per_pair(scores.policy[chosen].sum(), known)
        policy = scores.policy
        return Loss(value, pair_metrics(rewards[chosen], rewards[rejected], policy[chosen], policy[rejected]))


def _sigmoid(beta: float, smoothing: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return logistic(beta * (chosen - rejected), smoothing)


def _robust(beta: float, smoothing: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    logits = beta * (chosen - rejected)
    unbiased = -F.logsigmoid(logits) * (1 - smoothing) + F.logsigmoid(-logits) * smoothing
    return unbiased / (1 - 2 * smoothing)


def _hinge(beta: float, smoothing: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - beta * (chosen - rejected))


def _ipo(beta: float, smoothing: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def _apo_zero(beta: float, smoothing: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


FORMULAS: dict[str, Formula] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid,
    "apo_zero": _apo_zero,
}
PER_TOKEN = ("ipo", "sigmoid_norm")
