"""The loss that makes its own gradients, beside torch's: on one process, and with the vocabulary cut among ranks."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hpcft.train.cross_entropy import Columns, Scaling, log_probabilities, summed_in_chunks
from tests.train import small

WIDTH, VOCABULARY, ROWS = 6, 10, 7
SCALINGS = [Scaling(), Scaling(multiplier=0.25), Scaling(softcap=2.0), Scaling(multiplier=3.0, softcap=1.5)]


def parts(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCABULARY).to(dtype)
    return head, torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), torch.randint(0, VOCABULARY, (ROWS,))


def torchs_own(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    return -F.cross_entropy(scaling.logits(head(hidden)), targets, reduction="none")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("chunk", [1, 3, ROWS, 100])
def test_the_sum_and_its_gradients_are_those_of_torch(scaling: Scaling, chunk: int) -> None:
    head, hidden, targets = parts()
    inputs = [hidden, *head.parameters()]
    plain = torchs_own(head, hidden, targets, scaling).sum()
    ours = summed_in_chunks(hidden, targets, head, head, scaling, None, chunk)
    expected, found = (torch.autograd.grad(total * 0.3, inputs) for total in (plain, ours))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_log_probabilities_and_their_gradients_are_those_of_torch(scaling: Scaling) -> None:
    head, hidden, targets = parts()
    inputs, weights = [hidden, *head.parameters()], torch.linspace(-1, 2, ROWS)
    plain = torchs_own(head, hidden, targets, scaling)
    ours = log_probabilities(head(hidden), targets, scaling)
    expected, found = (torch.autograd.grad((numbers * weights).sum(), inputs) for numbers in (plain, ours))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, expected)


def test_a_frozen_head_gets_no_gradient_and_hands_one_on() -> None:
    head, hidden, targets = parts()
    head.requires_grad_(False)
    summed_in_chunks(hidden, targets, head, head, Scaling(), None, 2).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in head.parameters())


def test_in_bfloat16_the_loss_is_that_of_the_rounded_scores_in_float32() -> None:
    head, hidden, targets = parts(torch.bfloat16)
    total = summed_in_chunks(hidden, targets, head, head, Scaling(), None, 2)
    assert total.dtype is torch.float32
    torch.testing.assert_close(total, torchs_own(head, hidden, targets, Scaling()).sum(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4, 6])  # of 10 tokens: 5 + 5, 3 + 3 + 3 + 1, 2 × 5 and a rank without any
@pytest.mark.parametrize("scaling", SCALINGS[::3])
def test_a_vocabulary_cut_among_ranks_gives_the_same(scaling: Scaling, ranks: int) -> None:
    head, hidden, targets = parts()
    inputs = [hidden, *head.parameters()]
    plain = torchs_own(head, hidden, targets, scaling)
    of_hidden, *of_head = torch.autograd.grad(plain.sum(), inputs)
    for way in ("summed", "each"):
        answers = small.on_ranks(ranks, with_columns, way, scaling)
        for answer in answers:
            torch.testing.assert_close(torch.tensor(answer["total"]), plain.sum().detach())
        torch.testing.assert_close(sum(torch.tensor(a["hidden"]) for a in answers), of_hidden)
        for number, expected in enumerate(of_head):
            found = torch.cat([torch.tensor(a["head"][number]).view(-1, *expected.shape[1:]) for a in answers])
            torch.testing.assert_close(found, expected)


def with_columns(way: str, scaling: Scaling) -> dict[str, Any]:
    dist.init_process_group("gloo")
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    whole, hidden, targets = parts()
    most = -(-VOCABULARY // ranks)
    start = min(rank * most, VOCABULARY)
    length = min(most, VOCABULARY - start)
    head = copy.deepcopy(whole)
    for parameter in head.parameters():
        parameter.data = parameter.data[start : start + length].clone()
    columns = Columns(start, length, dist.new_group())
    if way == "summed":
        total = summed_in_chunks(hidden, targets, head, head, scaling, columns, 3)
    else:
        total = log_probabilities(head(hidden), targets, scaling, columns).sum()
    total.backward()
    return {
        "total": total.item(), "hidden": hidden.grad.tolist(), "head": [p.grad.tolist() for p in head.parameters()]
    }  # fmt: skip


def test_many_chunks_add_up_a_weight_s_gradient_in_float32() -> None:
    head, _, _ = parts(torch.bfloat16)
    torch.manual_seed(4)
    hidden, targets = torch.randn(2048, WIDTH, dtype=torch.bfloat16), torch.randint(0, VOCABULARY, (2048,))
    errors, weight = [], next(head.parameters())
    exact = torch.autograd.grad(torchs_own(head, hidden, targets, Scaling()).sum(), weight)[0].float()
    for chunk in (2048, 4):
        total = summed_in_chunks(hidden, targets, head, head, Scaling(), None, chunk)
        made = torch.autograd.grad(total, weight)[0].float()
        errors.append(float((made - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0] + 5e-3


def test_a_sum_gives_its_gradients_once() -> None:
    head, hidden, targets = parts()
    total = summed_in_chunks(hidden, targets, head, head, Scaling(), None, 2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        total.backward()
