"""What preference objectives share: how many pairs or answers a window has, how they are weighed, what is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hpcft.plan.plan import ObjectivePlan
from hpcft.train.protocols import CHOSEN, DESIRABLE, UNDESIRABLE, Batch, Mean, Windows

Metrics = dict[str, Mean]


@dataclass(frozen=True)
class Pairs:
    """An objective whose unit is a pair. A subclass gives the loss."""

    plan: ObjectivePlan

    def units(self, windows: Windows, index: int) -> int:
        """Pairs of a window."""
        return windows.count(index, (CHOSEN,))

    def count(self, batch: Batch) -> int:
        """Pairs of a micro batch."""
        return batch.kinds.count(CHOSEN)

    def ahead(self, model: nn.Module, batches: Iterable[Batch]) -> list[float]:
        """Nothing; those that add a loss per token give ``chosen_tokens``."""
        return []


@dataclass(frozen=True)
class Rated:
    """An objective whose unit is an answer with a label of its own. A subclass gives the loss."""

    plan: ObjectivePlan

    def units(self, windows: Windows, index: int) -> int:
        """Answers of a window."""
        return windows.count(index, (DESIRABLE, UNDESIRABLE))

    def count(self, batch: Batch) -> int:
        """Answers of a micro batch."""
        return len(batch.kinds)


def logistic(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """− log σ(logits), where a share ``smoothing`` of the labels is taken to be the wrong way round."""
    return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


def chosen_tokens(batches: Iterable[Batch], texts: bool) -> list[float]:
    """Pairs of the batches, and tokens of their chosen answers (texts: with what stands before them).

    A loss per token beside one per pair has two divisors, both of the whole global batch. A mean per micro batch, as
    other trainers take it, would change with accumulation and ranks.
    """
    pairs, tokens = 0, 0
    for batch in batches:
        pairs += batch.kinds.count(CHOSEN)
        tokens += _tokens(batch, texts)
    return [float(pairs), float(tokens)]


def _tokens(batch: Batch, texts: bool) -> int:
    chosen = torch.tensor([kind == CHOSEN for kind in batch.kinds] + [False], device=batch.documents.device)
    if not texts:
        return int(chosen[batch.documents.flatten()[batch.trained]].sum())
    return int(chosen[batch.documents].sum()) - batch.kinds.count(CHOSEN)  # a text's first token is no label


def per_pair(nll: torch.Tensor, known: Sequence[float]) -> torch.Tensor:
    """A sum of token losses in such a measure that, divided by the pairs of the global batch, it is their mean."""
    pairs, tokens = known
    return nll * (pairs / max(tokens, 1.0))


def pair_metrics(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor
) -> Metrics:
    """Rewards and log-probabilities of both answers, and how often the chosen one is ahead."""
    return {
        **reward_metrics(chosen_rewards, rejected_rewards),
        **_means({"logps/chosen": chosen, "logps/rejected": rejected}),
    }


def reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> Metrics:
    """Rewards of both answers, and how often the chosen one is ahead."""
    better = (chosen > rejected).double()
    return _means({"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": better})


def _means(shown: Mapping[str, torch.Tensor]) -> Metrics:
    return {name: Mean(numbers.detach().sum(), len(numbers)) for name, numbers in shown.items()}
