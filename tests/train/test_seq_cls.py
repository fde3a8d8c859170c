"""The loss of classification is transformers' own, for texts packed, padded and alone; no text costs nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from hpcft.data.kinds import Kind
from hpcft.train.batches import collate
from hpcft.train.objectives.seq_cls import Classification
from hpcft.train.skeleton import let_in
from tests.train import families, small

CLASSES = (2, 0, 3, 2, 1)
LENGTHS = ((4, 7, 3), (5,), (9,))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(**families.SIZES, num_labels=4, pad_token_id=None)
    made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    let_in(made)
    return made


def windows() -> small.Windows:
    draw, classes = np.random.default_rng(5), iter(CLASSES)
    return small.Windows(
        small.Window(
            draw.integers(0, small.VOCABULARY, size=sum(lengths)).astype(np.int32),
            np.ones(sum(lengths), bool),
            list(lengths),
            [Kind.LABELLED] * len(lengths),
            [float(next(classes)) for _ in lengths],
        )
        for lengths in LENGTHS
    )


def texts() -> list[torch.Tensor]:
    """Every text by itself, as its own tokenizer would give it."""
    parts = [np.split(window.tokens, np.cumsum(window.documents)[:-1]) for window in windows()]
    return [torch.tensor(part, dtype=torch.int64)[None] for of_window in parts for part in of_window]


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_its_gradient_are_transformers_own_of_each_text_alone(packed: bool, model: Any) -> None:
    for text, label in zip(texts(), CLASSES, strict=True):
        model(input_ids=text, labels=torch.tensor([label])).loss.backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        answers = torch.cat([model(input_ids=text).logits for text in texts()])
        expected = torch.nn.functional.cross_entropy(answers, torch.tensor(CLASSES), reduction="sum")
    model.zero_grad()
    loss = Classification().loss(model, collate(windows(), packed))
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    right = int((answers.argmax(-1) == torch.tensor(CLASSES)).sum())
    assert (loss.metrics["accuracy"].total.item(), loss.metrics["accuracy"].number) == (right, 5)


def test_units_are_texts_whatever_is_packed(model: Any) -> None:
    one, some = Classification(), windows()
    assert one.count(collate(some, packed=True)) == sum(one.units(some, i) for i in range(3)) == 5


def test_a_batch_with_no_text_costs_nothing_and_stays_in_the_graph(model: Any) -> None:
    batch = collate(windows(), packed=True)
    empty = dataclasses.replace(batch, kinds=(), margins=(), documents=torch.full_like(batch.documents, -1))
    loss = Classification().loss(model, empty)
    loss.value.backward()
    assert (loss.value.item(), Classification().count(empty), loss.metrics["accuracy"].number) == (0.0, 0, 0)
