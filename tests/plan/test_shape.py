"""Shapes against what the models' authors published, and a tiny one by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.plan.shape import Shape, read_shape, shape_of
from tests.plan.models import MIXTRAL, PUBLISHED, QWEN3_30B_A3B, TINY


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_of_weights_is_within_a_thousandth_of_the_published_one(name: str) -> None:
    config, published = PUBLISHED[name]
    shape = shape_of(config)
    assert shape is not None
    assert abs(shape.parameters - published) < published / 1000


def test_a_tiny_shape_is_counted_by_hand() -> None:
    shape = shape_of(TINY)
    assert shape is not None
    # 4 heads and 2 key heads of 2 numbers on a width of 8, a feed-forward of 16, a vocabulary of 32
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
    assert shape.layer == attention + 3 * 8 * 16 + 2 * 8 == 592
    assert shape.root == 2 * 32 * 8 + 8 == 520
    assert shape.parameters == 4 * 592 + 520


def test_of_experts_all_are_weights_and_some_are_active() -> None:
    shape = shape_of(QWEN3_30B_A3B)
    assert shape is not None
    assert shape.parameters == pytest.approx(30.5e9, rel=0.01)
    assert shape.layers * shape.active + shape.root == pytest.approx(3.35e9, rel=0.01)
    assert set(shape.linears()) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_mixtral_s_experts_are_as_wide_as_a_feed_forward() -> None:
    shape = shape_of(MIXTRAL)
    assert shape is not None
    assert shape.parameters == pytest.approx(46_702_792_704, rel=1e-3)
    assert shape.layers * shape.active + shape.root == pytest.approx(12.9e9, rel=0.01)
    assert shape.feed_forward == 2 * 14336


def test_experts_are_the_same_under_either_name_of_their_number() -> None:
    renamed = {**QWEN3_30B_A3B, "num_local_experts": 128}
    del renamed["num_experts"]  # as transformers 5 writes it
    assert shape_of(renamed) == shape_of(QWEN3_30B_A3B) is not None


@pytest.mark.parametrize(("family", "tied"), [("gemma2", True), ("cohere", True), ("smollm3", True), ("llama", False)])
def test_where_nothing_is_said_of_the_head_it_is_as_the_family_has_it(family: str, tied: bool) -> None:
    silent = {key: value for key, value in TINY.items() if key != "tie_word_embeddings"}
    shapes = [shape_of({**config, "model_type": family}) for config in (silent, {**TINY, "tie_word_embeddings": False})]
    assert [shape is not None and shape.tied for shape in shapes] == [tied, False]


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, "flash"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "eager"),
        ({"attn_logit_softcapping": None}, "flash"),
        ({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4}, "eager"),
        ({"attention_dropout": 0.1}, "sdpa"),
    ],
)
def test_the_attention_is_the_fastest_that_computes_what_the_model_asks_for(
    changes: dict[str, Any], attention: str
) -> None:
    shape = shape_of({**TINY, **changes})
    assert shape is not None
    assert shape.attention == attention


def test_the_length_that_a_model_was_made_for_is_not_known_where_positions_are_scaled() -> None:
    for scaling, positions in (
        (None, 4096),
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 0),
    ):
        for key in ("rope_scaling", "rope_parameters"):
            shape = shape_of({**TINY, "max_position_embeddings": 4096, key: scaling})
            assert shape is not None
            assert shape.positions == positions


def test_tied_weights_count_once() -> None:
    one, two = shape_of({**TINY, "tie_word_embeddings": True}), shape_of(TINY)
    assert one is not None
    assert two is not None
    assert two.parameters - one.parameters == 32 * 8


def test_without_an_activation_that_of_the_family_is_taken() -> None:
    silent = {key: value for key, value in TINY.items() if key != "hidden_act"}
    assert shape_of({**silent, "model_type": "qwen2"}) == shape_of({**TINY, "model_type": "qwen2"}) is not None
    assert shape_of({**silent, "model_type": "gpt_neox"}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"num_experts": 60},
        {"num_local_experts": 8},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
        {"kv_lora_rank": 512},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"mamba_d_state": 16},
        {"hidden_act": "gelu", "model_type": "gpt_neox"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": float("inf")},
        {"hidden_size": None},
    ],
)
def test_a_shape_that_is_not_understood_is_not_guessed(changes: dict[str, Any]) -> None:
    assert shape_of({**TINY, **changes}) is None
    assert shape_of({}) is None


def test_a_local_folder_is_read_and_anything_else_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.json"
    assert read_shape(str(tmp_path)) is None
    for text in ("{", "[]", '{"a": 1}', "[" * 5000):
        file.write_text(text)
        assert read_shape(str(tmp_path)) is None
    file.write_bytes(b"\xff\xfe\x00")
    assert read_shape(str(tmp_path)) is None
    file.write_text(json.dumps(TINY))
    assert isinstance(read_shape(str(tmp_path)), Shape)
    assert read_shape("~") is None, "a Plan does not depend on a home"
