"""The chunked loss is the plain one, gradients included, whatever the head does."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen2Config

from hpcft.plan.activations import chunk_rows
from hpcft.train import cross_entropy
from hpcft.train import head as heads
from hpcft.train.batches import collate, untrained
from hpcft.train.objectives.sft import Supervised
from tests.train import small

CPU = torch.device("cpu")
SFT = Supervised()

SIZES: dict[str, Any] = {
    "vocab_size": small.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "softcapped": Gemma2Config(**SIZES, final_logit_softcapping=3.0, attn_implementation="eager"),
    "scaled": GraniteConfig(**SIZES, logits_scaling=4.0),
}


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def plain_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_chunked_loss_is_the_plain_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(name), collate(small.windows(3), packed=True)
    head = heads.head_of(model, CPU)
    assert head is not None, "fell back to whole logits"
    monkeypatch.setitem(heads.HEADS, model, dataclasses.replace(head, chunk=5))
    plain = plain_loss(model, batch)
    plain.backward()
    expected = gradients(model)
    loss = SFT.loss(model, batch).value
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5)


def test_a_head_makes_as_many_scores_at_a_time_as_it_is_told_the_first_time() -> None:
    model = made("tied")
    asked = [heads.head_of(model, CPU, chunk) for chunk in (7, 0)]
    assert [head.chunk for head in asked if head] == [7, 7]
    usual = heads.head_of(made("tied"), CPU)
    assert usual is not None
    assert usual.chunk == chunk_rows(small.VOCABULARY)


def test_an_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made("tied"), collate(small.windows(2), packed=True)
    expected = SFT.loss(model, batch).value.item()
    monkeypatch.setattr(cross_entropy, "_gradient", None)
    with torch.no_grad():
        assert SFT.loss(model, batch).value.item() == pytest.approx(expected, rel=1e-6)


def test_a_head_that_does_more_gets_its_logits_whole() -> None:
    model, batch = made("untied"), collate(small.windows(2), packed=True)
    forward = model.forward

    def biased(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        out.logits = out.logits + torch.arange(small.VOCABULARY)
        return out

    model.forward = biased
    with pytest.warns(UserWarning, match="computed whole"):
        loss = SFT.loss(model, batch).value
    assert loss.item() == pytest.approx(plain_loss(model, batch).item(), rel=1e-6)


def test_a_batch_with_nothing_to_train_costs_nothing_and_stays_in_the_graph() -> None:
    model, batch = made("tied"), untrained(collate(small.windows(2), packed=True))
    loss = SFT.loss(model, batch).value
    loss.backward()
    assert (loss.item(), SFT.count(batch)) == (0.0, 0)


def test_units_of_windows_are_the_count_of_their_batch() -> None:
    windows = small.windows(6)
    batch = collate(windows, packed=True)
    assert SFT.count(batch) == sum(SFT.units(windows, i) for i in range(6)) == int((batch.labels != -100).sum())


def test_the_probe_of_the_head_leaves_the_model_in_training() -> None:
    model = made("tied").train()
    with warnings.catch_warnings():
        heads.head_of(model, CPU)
    assert model.training
