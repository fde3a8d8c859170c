"""Preference losses are the published ones, to five digits, however the pairs are batched."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hpcft.catalog import OBJECTIVES
from hpcft.plan.plan import ObjectivePlan
from hpcft.train import reference
from hpcft.train.batches import collate, untrained
from hpcft.train.modes import in_evaluation
from hpcft.train.protocols import Batch, Loss
from hpcft.train.score import text_scores
from hpcft.train.scores import document_scores, texts, token_scores
from hpcft.train.windows import mismatched
from tests import plans
from tests.train import oracle, small

TASKS = ("dpo", "kto", "orpo", "cpo", "simpo", "rm")
# the oracle's name → task and its settings beside a beta of 0.1
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "hinge": ("dpo", {"loss_type": "hinge"}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "sigmoid_norm": ("dpo", {"loss_type": "sigmoid_norm"}),
    "apo_zero": ("dpo", {"loss_type": "apo_zero"}),
    "robust": ("dpo", {"loss_type": "robust", "label_smoothing": 0.2}),
    "sigmoid+sft": ("dpo", {"rpo_alpha": 0.5}),
    "kto": ("kto", {"desirable_weight": 1.3}),
    "orpo": ("orpo", {}),
    "cpo": ("cpo", {"cpo_alpha": 1.0}),
    "cpo hinge": ("cpo", {"cpo_alpha": 1.0, "loss_type": "hinge"}),
    "simpo": ("simpo", {"simpo_gamma": 0.5}),
    "simpo+nll": ("simpo", {"simpo_gamma": 0.5, "cpo_alpha": 1.0}),
    "rm": ("rm", {}),
    "rm centred": ("rm", {"center_rewards_coefficient": 0.5}),
}
Pair = tuple[torch.nn.Module, torch.nn.Module]


def objective(task: str, **settings: Any) -> Any:
    plan: ObjectivePlan = dataclasses.replace(
        plans.plan().objective, **{"beta": 0.1, "loss_type": "sigmoid", **settings}
    )
    return importlib.import_module(OBJECTIVES[task].module).build(plan)


def windows_for(task: str) -> small.Windows:
    return oracle.rated() if task == "kto" else oracle.windows()


def batches_for(task: str, packed: bool = True, apart: bool = False) -> list[Batch]:
    """All windows in one batch, or each in its own; unpacked, a window holds one answer or one pair."""
    windows = windows_for(task) if packed or task != "kto" else alone(windows_for(task))
    groups = [[i] for i in range(len(windows))] if apart else [list(range(len(windows)))]
    return [_batch(windows, group, packed, task) for group in groups]


def _batch(windows: small.Windows, group: list[int], packed: bool, task: str) -> Batch:
    batch = collate([windows[i] for i in group], packed, tuple(group))
    if task != "kto":
        return batch
    return dataclasses.replace(batch, others=collate([mismatched(windows, i, 64) for i in group], packed))


def alone(windows: small.Windows) -> small.Windows:
    """The same answers, each in a window of its own where it needs no other, pairs one after the other."""
    found = small.Windows()
    for window in windows:
        ends = np.cumsum(window.documents)[:-1]
        for tokens, trained, kind in zip(
            np.split(window.tokens, ends), np.split(window.trained, ends), window.kinds, strict=True
        ):
            found.append(small.Window(tokens, trained, [len(tokens)], [kind]))
    return found


def referenced(batch: Batch, model: torch.nn.Module) -> Batch:
    """The batch with the numbers of another model as its reference."""
    with in_evaluation(model):
        numbers = tuple(document_scores(model, batch).policy.tolist())
    others = None if batch.others is None else referenced(batch.others, model)
    return dataclasses.replace(batch, reference=numbers, others=others)


def mean_loss(task: str, batches: list[Batch], policy: torch.nn.Module, reference: Any = None, **settings: Any) -> Any:
    """The loss as the loop takes it: sums over the batches, divided by the units of them all."""
    one = objective(task, **settings)
    batches = [referenced(batch, reference) for batch in batches] if reference is not None else batches
    known = one.ahead(policy, batches)
    return sum(one.loss(policy, batch, known).value for batch in batches) / sum(one.count(b) for b in batches)


@pytest.fixture(scope="module")
def models() -> Pair:
    return oracle.model(0), oracle.model(1)


@pytest.fixture(scope="module")
def reward_model() -> torch.nn.Module:
    return oracle.reward_model(0)


@pytest.fixture
def models_for(models: Pair, reward_model: torch.nn.Module) -> Callable[[str], Pair]:
    """Policy and reference of a task."""
    return lambda task: (reward_model if task == "rm" else models[0], models[1])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("apart", [False, True], ids=["one batch", "a batch each"])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_trl(name: str, apart: bool, packed: bool, models_for: Callable[[str], Pair]) -> None:
    task, settings = CASES[name]
    loss = mean_loss(task, batches_for(task, packed, apart), *models_for(task), **settings)
    assert loss.item() == pytest.approx(oracle.ORACLE[name], rel=1e-5)


def test_the_oracle_has_a_number_for_every_objective() -> None:
    assert {task for task, _ in CASES.values()} == set(TASKS)
    assert CASES.keys() == oracle.ORACLE.keys()
    assert set(TASKS) == {row.name for row in OBJECTIVES.values() if row.rows in ("pair", "rated")}


def test_without_packing_both_answers_of_a_pair_have_rows_of_their_own() -> None:
    [batch] = batches_for("dpo", packed=False)
    assert batch.lengths == [[9, 2], [11], [10, 1], [5, 6]]
    assert batch.kinds == (1, 2, 1, 2)
    assert batch.documents[:, 0].tolist() == [0, 1, 2, 3]
    assert batch.positions[:, 0].tolist() == [0] * 4


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(
    task: str, models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    loss = mean_loss(task, batches_for(task), models[0], models[0]).item()
    assert loss == pytest.approx(math.log(2) if task == "dpo" else 0.5, rel=1e-6)


def test_smoothing_is_the_conservative_loss(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    """TRL's ``sigmoid`` ignores it; there it is a part of ``robust``, by which the value can be had."""
    clean, robust = (oracle.ORACLE[name] for name in ("sigmoid", "robust"))
    reverse = (clean * 0.8 - robust * 0.6) / 0.2
    loss = mean_loss("dpo", batches_for("dpo"), *models, label_smoothing=0.2)
    assert loss.item() == pytest.approx(clean * 0.8 + reverse * 0.2, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # in float64 throughout, norms too
    norm = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    torch.set_default_dtype(torch.float64)
    try:
        policy: torch.nn.Module = oracle.reward_model(0) if CASES[name][0] == "rm" else oracle.model(0)
        _compare_gradients(name, policy.double(), oracle.model(1).double())
    finally:
        torch.set_default_dtype(torch.float32)


def _compare_gradients(name: str, policy: torch.nn.Module, reference: torch.nn.Module) -> None:
    task, settings = CASES[name]
    batches = [referenced(batch, reference) for batch in batches_for(task, apart=True)]
    one = objective(task, **settings)
    known = one.ahead(policy, batches)  # KTO's is not differentiated

    def loss() -> torch.Tensor:
        return torch.stack([one.loss(policy, batch, known).value for batch in batches]).sum()

    parameter = policy.get_parameter("model.layers.1.self_attn.v_proj.weight")
    loss().backward()
    assert parameter.grad is not None
    direction, step = torch.randn_like(parameter), 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            parameter.add_(sign * step * direction)
            values.append(float(loss()))
    measured = (values[0] - values[1]) / (2 * step)
    assert float((parameter.grad * direction).sum()) == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_with_nothing_to_count_costs_nothing_and_stays_in_the_graph(
    task: str, models_for: Callable[[str], Pair]
) -> None:
    one, [batch], (policy, reference) = objective(task), batches_for(task), models_for(task)
    empty = untrained(referenced(batch, reference))
    known = one.ahead(policy, [empty, referenced(batch, reference)])
    loss: Loss = one.loss(policy, empty, known)
    loss.value.backward()
    assert (loss.value.item(), one.count(empty)) == (0.0, 0)
    assert {mean.number for mean in loss.metrics.values()} == {0}
    assert loss.metrics.keys() == one.loss(policy, referenced(batch, reference), known).metrics.keys()


@pytest.mark.parametrize("task", TASKS)
def test_units_of_windows_are_the_count_of_their_batch(task: str) -> None:
    one, windows, [batch] = objective(task), windows_for(task), batches_for(task)
    assert one.count(batch) == sum(one.units(windows, i) for i in range(len(windows))) == (4 if task == "kto" else 2)


@pytest.mark.parametrize("packed", [True, False])
def test_scores_of_documents_are_those_of_each_alone(
    packed: bool, models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    batch, singles = _batch(alone(oracle.windows()), [0, 1, 2, 3], packed, ""), alone(oracle.windows())
    together = document_scores(models[0], batch)
    each = [document_scores(models[0], collate([single], packed=False)) for single in singles]
    torch.testing.assert_close(together.policy, torch.cat([one.policy for one in each]), rtol=1e-5, atol=1e-5)
    assert together.counts.tolist() == [4, 6, 7, 2]


@pytest.mark.parametrize("packed", [True, False])
def test_a_reward_is_the_score_at_the_last_token_of_each_text(packed: bool, reward_model: torch.nn.Module) -> None:
    batch = _batch(alone(oracle.windows()), [0, 1, 2, 3], packed, "")
    texts = [torch.tensor([window.tokens.tolist()]) for window in alone(oracle.windows())]
    expected = torch.cat([reward_model(input_ids=text).logits for text in texts])
    torch.testing.assert_close(text_scores(reward_model, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_text_that_ends_in_the_padding_token_is_scored_at_its_end(reward_model: torch.nn.Module) -> None:
    window = small.Window(np.array([5, 9, 0], np.int32), np.ones(3, bool), [3], [1])
    [score] = text_scores(reward_model, collate([window], packed=True, multiple=8))
    [alone] = text_scores(reward_model, collate([window], packed=True))
    hidden = reward_model.get_submodule("model")(input_ids=torch.tensor([[5, 9, 0]])).last_hidden_state
    expected = reward_model.get_submodule("score")(hidden[0, -1]).item()
    assert (score.item(), alone.item()) == (pytest.approx(expected, rel=1e-5),) * 2


def test_the_scores_of_whole_texts_leave_out_padding_and_first_tokens(
    models: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    [batch] = batches_for("orpo")
    sums = texts(batch, token_scores(models[0], batch, everywhere=True).policy)
    everything = small.Windows(
        dataclasses.replace(window, trained=np.ones_like(window.trained)) for window in oracle.windows()
    )
    expected = document_scores(models[0], collate(everything, packed=True)).policy
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_s_other_answer_is_that_of_the_document_before_it() -> None:
    windows = alone(oracle.rated())
    others = [mismatched(windows, i, 64).tokens.tolist() for i in range(4)]
    first, second = oracle.PROMPTS
    good, bad = oracle.CHOSEN, oracle.REJECTED
    assert others == [first + bad[1], first + good[0], second + bad[0], second + good[1]]
    [packed] = oracle.rated()
    assert mismatched(small.Windows([packed]), 0, 64).tokens.tolist() == [token for other in others for token in other]


def test_a_document_with_another_s_answer_is_no_longer_than_the_longest() -> None:
    windows = alone(oracle.rated())
    assert mismatched(windows, 2, 5).documents == [5]
    assert mismatched(windows, 2, 5).trained.tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("extra", ["lm_head", "embed_tokens"])
def test_switched_off_are_adapters_and_modules_to_save_and_dropout_and_nothing_else(extra: str) -> None:
    base = oracle.model(0)
    batch = collate(oracle.windows(), packed=True)
    expected = document_scores(base, batch).policy.detach()
    options: dict[str, Any] = {"target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", modules_to_save=[extra], **options)).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    scores = document_scores(adapted, batch, reference=True)
    assert scores.reference is not None
    torch.testing.assert_close(scores.reference, expected, rtol=1e-5, atol=1e-5)
    assert not scores.reference.requires_grad
    assert float((scores.policy.detach() - expected).abs().min()) > 0.01
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
    assert all(module.training for module in adapted.modules())


def test_numbers_that_the_ranks_read_are_not_touched_by_an_attempt_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, save = tmp_path / "train.npy", np.save
    reference._write(file, np.ones((4, 2), np.float32), {"data": "a"})
    read = np.load(file, mmap_mode="r")

    def cut_short(file: Path, numbers: Any) -> None:
        save(file, numbers[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", cut_short)
    with pytest.raises(OSError, match="No space left"):
        reference._write(file, np.zeros((4, 2), np.float32), {"data": "a"})
    assert file.stat().st_size > read.nbytes, "what is mapped is no longer there"
    assert read.tolist() == [[1.0, 1.0]] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["train.npy"], "what found no room takes some"
