"""Reward model (Stiennon et al. 2020, Ouyang et al. 2022): a score of each text, higher for the chosen one.

With r the score at a text's last token, m the pair's margin (0 where its record has none); a unit is a pair:

    − log σ(r_c − r_r − m) + center_rewards_coefficient · (r_c + r_r)²

The margin is Llama 2's (Touvron et al. 2023), the second term holds the middle of all rewards at 0 (Eisenstein et al.
2023): the first one knows differences only, so that rewards may drift.
Trap: what is scored is a text's end, the token that closes its last turn; so truncate_right is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.preference import Pairs, reward_metrics
from hpcft.train.protocols import Batch, Loss
from hpcft.train.score import text_scores
from hpcft.train.scores import pairs


def build(plan: ObjectivePlan) -> Reward:
    """center_rewards_coefficient is the plan's."""
    return Reward(plan)


class Reward(Pairs):
    """Fulfils ``protocols.Objective``."""

    def loss(self, model: nn.Module, batch: Batch, known: Sequence[float] = ()) -> Loss:
        """Summed over the pairs of the micro batch."""
        rewards = text_scores(model, batch).squeeze(-1)
        margins = torch.tensor(batch.margins, dtype=torch.float32).to(rewards.device, non_blocking=True)
        good, bad = pairs(batch)
        chosen, rejected = rewards[good], rewards[bad]
        losses = -F.logsigmoid(chosen - rejected - margins[good])
        if self.plan.center_rewards_coefficient:
            losses = losses + self.plan.center_rewards_coefficient * (chosen + rejected) ** 2
        return Loss(losses.sum(), reward_metrics(chosen, rejected))
