"""Estimates against what the models' authors published; they are shown and never decide."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.plan.estimate import PEAK_TFLOPS, guessed_tokens, model_config, parameters, seconds_per_step
from tests.words import PROFILES, plan, profile


def shape(
    hidden: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int, tied: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        **more,
    }


# (config.json of the model, parameters as its authors' safetensors count them)
PUBLISHED = {
    "Qwen2.5-0.5B": (shape(896, 24, 14, 2, 4864, 151936, tied=True), 494_032_768),
    "Qwen2.5-1.5B": (shape(1536, 28, 12, 2, 8960, 151936, tied=True), 1_543_714_304),
    "Qwen2.5-7B": (shape(3584, 28, 28, 4, 18944, 152064), 7_615_616_512),
    "Qwen2.5-72B": (shape(8192, 80, 64, 8, 29568, 152064), 72_706_203_648),
    "Qwen3-8B": (shape(4096, 36, 32, 8, 12288, 151936, head_dim=128), 8_190_735_360),
    "Qwen3-0.6B": (shape(1024, 28, 16, 8, 3072, 151936, tied=True, head_dim=128), 596_049_920),
    "Llama-2-7b": (shape(4096, 32, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama-3.1-8B": (shape(4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "Llama-3.2-1B": (shape(2048, 16, 32, 8, 8192, 128256, tied=True, head_dim=64), 1_235_814_400),
    "Mistral-7B-v0.3": (shape(4096, 32, 32, 8, 14336, 32768), 7_248_023_552),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_of_weights_is_within_a_thousandth_of_the_published_one(name: str) -> None:
    config, published = PUBLISHED[name]
    found = parameters(config)
    assert found is not None
    assert abs(found - published) < published / 1000


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": "x"},
        {**PUBLISHED["Qwen2.5-7B"][0], "num_experts": 60},
        {**PUBLISHED["Qwen2.5-7B"][0], "num_local_experts": 8},
        {**PUBLISHED["Qwen2.5-7B"][0], "kv_lora_rank": 512},
        {**PUBLISHED["Qwen2.5-7B"][0], "hidden_act": "gelu", "model_type": "gpt_neox"},
        {**PUBLISHED["Qwen2.5-7B"][0], "num_attention_heads": 0},
        {**PUBLISHED["Qwen2.5-7B"][0], "hidden_size": float("inf")},
        {**PUBLISHED["Qwen2.5-7B"][0], "hidden_size": None},
    ],
)
def test_a_shape_that_is_not_understood_is_not_guessed(config: dict[str, Any]) -> None:
    assert parameters(config) is None


def test_a_step_takes_the_time_of_its_arithmetic() -> None:
    made = plan("--global_batch_size 16 --max_length 2048 --tuner_type full --gradient_checkpointing none")
    tokens, gpus = 16 * 2048, 8
    by_hand = 6 * 7_615_616_512 * tokens / (gpus * 989e12 * 0.4)
    found = seconds_per_step(made, 7_615_616_512)
    assert found == pytest.approx(by_hand)


def test_lora_takes_two_thirds_and_recomputation_a_forward_pass_more() -> None:
    def seconds(line: str) -> float:
        return seconds_per_step(plan(line), 10**9) or 0.0

    full = seconds("--tuner_type full --gradient_checkpointing none")
    assert seconds("--tuner_type lora --gradient_checkpointing none") == pytest.approx(full * 4 / 6)
    assert seconds("--tuner_type full --gradient_checkpointing full") == pytest.approx(full * 8 / 6)


@pytest.mark.parametrize("cluster", [name for name in PROFILES if profile(name).gpu_type])
def test_every_gpu_that_a_profile_names_has_its_peak(cluster: str) -> None:
    assert profile(cluster).gpu_type in PEAK_TFLOPS


def test_where_the_speed_is_not_known_there_is_no_time() -> None:
    made = plan()
    unknown = dataclasses.replace(made, resources=dataclasses.replace(made.resources, gpu_type="x1"))
    assert seconds_per_step(unknown, 10**9) is None
    assert seconds_per_step(plan(cluster="local"), 10**9) is None


def test_the_configuration_of_a_local_folder_is_read_and_anything_else_is_none(tmp_path: Path) -> None:
    assert model_config(plan()) is None
    made = plan()
    here = dataclasses.replace(made, model=dataclasses.replace(made.model, path=str(tmp_path)))
    for text, expected in (("{", None), ("[]", None), ('{"a": 1}', {"a": 1})):
        (tmp_path / "config.json").write_text(text)
        assert model_config(here) == expected
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert model_config(here) is None


def test_tokens_are_guessed_from_the_size_of_text_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"text": "x" * 387}) + "\n"
    Path("a.jsonl").write_text(line * 100)
    size = len(line)
    assert size == 400
    assert guessed_tokens(plan()) == 100 * size // 4
    ten = plan("--interleave_prob 1")
    ten = dataclasses.replace(
        ten, data=dataclasses.replace(ten.data, train=(dataclasses.replace(ten.data.train[0], rows=10),))
    )
    assert guessed_tokens(ten) == 10 * size // 4
    for path in ("gone.jsonl", "a.parquet"):
        other = dataclasses.replace(ten.data.train[0], path=path)
        assert guessed_tokens(dataclasses.replace(ten, data=dataclasses.replace(ten.data, train=(other,)))) is None
