"""Windows become rows: shifted labels, restarting positions, padding that nobody sees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hpcft.errors import Refusal
from hpcft.train import attention, batches
from hpcft.train import model as models
from hpcft.train.batches import IGNORED, ahead, collate, steps
from hpcft.train.objectives.sft import Supervised
from hpcft.train.order import Order
from tests import plans
from tests.train import small

CPU = torch.device("cpu")
SFT = Supervised()


def example() -> list[small.Window]:
    first = small.Window(np.array([5, 6, 7, 8, 9]), np.array([0, 1, 1, 0, 1], dtype=bool), [3, 2])
    second = small.Window(np.array([1, 2, 3]), np.array([0, 0, 1], dtype=bool), [3])
    return [first, second]


def test_labels_are_the_next_token_of_the_same_document_where_it_is_trained() -> None:
    batch = collate(example(), packed=True)
    assert batch.labels.tolist() == [[6, 7, IGNORED, 9, IGNORED], [IGNORED, 3, IGNORED, IGNORED, IGNORED]]
    assert batch.trained.tolist() == [0, 1, 3, 6]


def test_rows_of_compiled_layers_are_full_and_divide_among_tensor_ranks() -> None:
    plan = plans.plan(train={"compiled": True}, data={"max_length": 5}, layout=plans.layout(1, 2, tp=2))
    batch = batches.batch_of(small.Windows(example()), (0, 1), plan)
    assert batch.tokens.shape == (2, 6)


def test_the_first_token_of_a_document_is_never_a_label() -> None:
    window = example()[0]
    window.trained[3] = True  # begins the second document
    assert collate([window], packed=True).labels[0, 2] == IGNORED


def test_packed_positions_restart_and_the_padding_is_a_document() -> None:
    batch = collate(example(), packed=True)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch.lengths == [[3, 2], [3, 2]]


def test_unpacked_rows_count_on_so_that_no_mask_is_built() -> None:
    batch = collate(example()[1:] + example()[1:], packed=False)
    assert batch.positions.tolist() == [[0, 1, 2]] * 2


@pytest.fixture
def sdpa_model(model: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = models.load_config(small.tiny(model).model)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_s_loss_is_that_of_its_documents_alone(packed: bool, sdpa_model: torch.nn.Module) -> None:
    windows = small.windows(3)
    if not packed:
        windows = small.Windows(w for w in small.windows(20) if len(w.documents) == 1)
        assert len({len(w.tokens) for w in windows}) > 1
    together = SFT.loss(sdpa_model, collate(windows, packed)).value.item()
    alone = 0.0
    for window in windows:
        for start, length in zip(np.cumsum([0, *window.documents[:-1]]), window.documents, strict=True):
            part = slice(start, start + length)
            document = small.Window(window.tokens[part], window.trained[part], [length])
            alone += SFT.loss(sdpa_model, collate([document], packed=False)).value.item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_packing_check_passes_a_model_that_keeps_documents_apart(sdpa_model: torch.nn.Module) -> None:
    attention.check_packing(sdpa_model, sdpa_model.config, CPU, torch.float32)


def test_the_packing_check_refuses_a_model_whose_documents_see_each_other(
    sdpa_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(Refusal, match="see each other"):
        attention.check_packing(sdpa_model, sdpa_model.config, CPU, torch.float32)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_changes_memory_not_numbers(policy: str, sdpa_model: torch.nn.Module) -> None:
    batch = collate(small.windows(2), packed=True)

    def gradients() -> list[torch.Tensor]:
        sdpa_model.zero_grad()
        SFT.loss(sdpa_model, batch).value.backward()
        return [p.grad.clone() for p in sdpa_model.parameters()]

    sdpa_model.train()
    plain = gradients()
    models.recompute(sdpa_model, policy)
    layers = [layer.gradient_checkpointing for layer in sdpa_model.model.layers]
    assert layers == ([True, True] if policy == "full" else [True, False])
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_worker_threads_do_not_change_the_order(workers: int) -> None:
    def maker(i: int) -> Callable[[], int]:
        return lambda: (threading.Event().wait(0.01 * (i % 3)), i)[1]

    assert list(ahead((maker(i) for i in range(12)), workers)) == list(range(12))


def test_a_broken_window_is_an_error_of_the_step_that_wants_it() -> None:
    def bad() -> int:
        raise OSError("the shard is gone")

    made = ahead(iter([lambda: 1, bad]), 2)
    assert next(made) == 1
    with pytest.raises(OSError, match="shard is gone"):
        next(made)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_steps_of_all_ranks_are_the_order(workers: int) -> None:
    windows, order = small.windows(10), Order(10, 4, 1)
    plan = plans.plan(batch={"micro_windows": 1}, train={"dataloader_workers": workers})
    readers = [steps(windows, order, 0, plan, rank, 2) for rank in range(2)]
    for expected, _ in zip(order.steps(0), range(5), strict=False):
        seen: list[Any] = []
        for reader in readers:
            step = next(reader)
            assert step.windows == expected
            seen += [(m.share.position, m.batch.windows) for m in step.micros]
        assert tuple(w for _, ws in sorted(seen) for w in ws) == expected


def test_pads_are_valid_tokens() -> None:
    assert int(collate(example(), packed=True).tokens[1, 3]) == batches.PAD
