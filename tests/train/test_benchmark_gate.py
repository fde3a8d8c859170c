"""The gate of benchmarks.speed: another trainer's time counts only when it trains the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.made import Windows
from benchmarks.numbers import disagreement
from benchmarks.shapes import SHAPES


def loss_and_norm(apart: bool) -> tuple[list[float], list[float]]:
    """Of two windows of packed documents. apart: they do not see each other."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES["tiny"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    windows, total, units = Windows(2, 256, config.vocab_size, 8), torch.zeros(()), 0
    for window in (windows[0], windows[1]):
        tokens = torch.tensor(window.tokens[None]).long()
        labels = torch.where(torch.tensor(window.trained[None]), tokens, -100)[0, 1:]
        lengths = window.documents if apart else [len(window.tokens)]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        units += int((labels != -100).sum())
    (total / units).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return [float(total.detach() / units)], [float(norm)]


def test_documents_that_see_each_other_are_another_training() -> None:
    right = loss_and_norm(apart=True)
    assert disagreement(right, loss_and_norm(apart=True)) == ""
    assert disagreement(right, loss_and_norm(apart=False)).startswith("gradient norm of step 1")
