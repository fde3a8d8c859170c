"""A base model's folder: what no GPU would mend is said from config.json and the headers of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hpcft.plan.basefiles import INDEX, SINGLE, unusable
from tests.plans import plan

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}
LAYER = ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "mlp.down_proj.weight", "input_layernorm.weight")
NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{number}.{name}" for number in range(3) for name in LAYER),
    "model.norm.weight",
)


def weights(names: Iterable[str]) -> bytes:
    """A safetensors file with four bytes for each name."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(names)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4 * len(header))


def folder(path: Path, names: Iterable[str] | None = NAMES, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if names is not None:
        (path / SINGLE).write_bytes(weights(names))
    return path


def sharded(path: Path, **config: Any) -> Path:
    """The same weights in two files with an index."""
    folder(path, None, **config)
    parts = {f"model-0000{n}-of-00002.safetensors": NAMES[n - 1 :: 2] for n in (1, 2)}
    for file, names in parts.items():
        (path / file).write_bytes(weights(names))
    table = {name: file for file, names in parts.items() for name in names}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return path


def said(path: Path, *, trust: bool = False, scratch: bool = False, **changes: Any) -> str:
    chosen = plan(model={"from_scratch": scratch, "trust_remote_code": trust}, **changes)
    return "\n".join(map(str, unusable(path, chosen)))


def test_what_transformers_loads_whole_is_fit_however_it_was_saved(tmp_path: Path) -> None:
    head = [name.replace("model.embed_tokens", "lm_head") for name in NAMES]  # tied, under its other name
    assert said(folder(tmp_path, head)) == ""
    assert "embed_tokens" in said(folder(tmp_path, head, tie_word_embeddings=False))
    assert said(folder(tmp_path, [*NAMES, "model.layers.0.self_attn.rotary_emb.inv_freq"])) == ""
    (tmp_path / SINGLE).unlink()
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "parts").mkdir()
    for file in tmp_path.glob("model-*"):
        file.rename(tmp_path / "parts" / file.name)
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert said(tmp_path) == ""


def test_a_whole_model_in_one_file_or_several_is_fit(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert said(folder(tmp_path / "one")) == ""
    assert said(sharded(tmp_path / "two")) == ""


def test_a_folder_without_weights_is_refused_unless_the_run_starts_from_scratch(tmp_path: Path) -> None:
    assert "no weights are there" in said(folder(tmp_path, None))
    assert said(tmp_path, scratch=True) == ""


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_config.json"])
def test_what_cannot_be_judged_here_is_left_to_the_ranks(tmp_path: Path, file: str) -> None:
    (folder(tmp_path, None) / file).write_text("{}")
    assert said(tmp_path) == ""


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "files of its weights are missing\n  value: model-00002-of-00002.safetensors" in said(tmp_path)


def test_a_link_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    (folder(tmp_path, None) / SINGLE).symlink_to("../blobs/none")
    assert f"files of its weights are missing\n  value: {tmp_path / SINGLE}" in said(tmp_path)


def test_a_file_that_ends_too_early_is_named_with_its_sizes(tmp_path: Path) -> None:
    file = folder(tmp_path) / SINGLE
    whole = file.read_bytes()
    file.write_bytes(whole[:-6])
    assert f"its header tells of {len(whole):,} bytes, and it has {len(whole) - 6:,}" in said(tmp_path)
    for length in (0, 5, 40):
        file.write_bytes(whole[:length])
        assert f"it ends inside of its header, after {length} bytes" in said(tmp_path)
    assert str(file) in said(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        ((9).to_bytes(8, "little") + b"[not json", "no safetensors header"),
        ((4).to_bytes(8, "little") + b"[{}]", "no safetensors header"),
    ],
)
def test_a_file_of_another_kind_is_told_from_weights(tmp_path: Path, content: bytes, why: str) -> None:
    (folder(tmp_path) / SINGLE).write_bytes(content)
    assert why in said(tmp_path)


def test_a_layer_without_tensors_is_named_in_any_family(tmp_path: Path) -> None:
    folder(tmp_path, [name for name in NAMES if ".layers.1." not in name], model_type="olmo2")
    assert "lack weights" in said(tmp_path)
    assert "value: model.layers.1.*" in said(tmp_path)


@pytest.mark.parametrize("absent", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", NAMES[0]])
def test_of_a_plain_family_a_single_missing_tensor_is_named(tmp_path: Path, absent: str) -> None:
    folder(tmp_path, [name for name in NAMES if name != absent])
    assert f"value: {absent}" in said(tmp_path)


def test_a_head_is_missed_where_it_is_neither_the_embedding_nor_replaced_by_scores(tmp_path: Path) -> None:
    folder(tmp_path, tie_word_embeddings=False)
    assert "value: lm_head.weight" in said(tmp_path)
    assert said(tmp_path, train={"objective": "rm"}) == ""
    folder(tmp_path, [*NAMES, "lm_head.weight"], tie_word_embeddings=False)
    assert said(tmp_path) == ""


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, model_type="olmo2")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(weights(NAMES[2::2]))
    assert f"value: {NAMES[0]}" in said(tmp_path)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["transformer.wte.weight", "transformer.blocks_of_mine.0.w"], {}),  # names of another manner
        ([f"model.layers.{n}.{name}" for n in (0, 1, 2, 3) for name in LAYER], {"model_type": "deepseek_v3"}),  # MTP
        (["model.layers.0.a", "vision.layers.5.b"], {"model_type": "two_towers"}),
        (["layers.0.dense.w", "layers.1.experts.0.w", "layers.2.experts.0.w"], {"model_type": "mixed"}),
        ([f"text.{name}" for name in (*NAMES, "lm_head.weight")], {"tie_word_embeddings": False}),
        (["model.layers.0.a"], {"auto_map": {"AutoModelForCausalLM": "m.M"}}),
    ],
)
def test_names_that_do_not_follow_the_number_of_layers_are_no_fault(
    tmp_path: Path, names: list[str], config: dict[str, Any]
) -> None:
    assert said(folder(tmp_path, names, **config)) == ""


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
        {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": ["SomethingNew"], "is_encoder_decoder": True},
        {"architectures": None, "model_type": "t5"},
    ],
)
def test_a_model_that_is_no_decoder_of_text_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "this is no decoder of text" in said(folder(tmp_path, **config))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"},
        {"architectures": ["T5GemmaLikeForCausalLM"], "model_type": "t5"},
        {"architectures": "what is this"},
        {"quantization_config": None},
        {"quantization_config": {}},
    ],
)
def test_a_decoder_of_another_name_is_not_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    assert said(folder(tmp_path, **config)) == ""


def test_a_repositorys_own_code_may_make_a_decoder_of_anything(tmp_path: Path) -> None:
    own = {"architectures": ["XForConditionalGeneration"], "model_type": "t5", "auto_map": {"AutoModel": "x.Y"}}
    assert "no decoder" in said(folder(tmp_path, **own))
    assert said(tmp_path, trust=True) == ""


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes"])
def test_a_base_quantised_beforehand_is_refused_with_what_to_use_instead(tmp_path: Path, method: str) -> None:
    folder(tmp_path, None, quantization_config={"quant_method": method, "bits": 4})
    assert f"quantised beforehand, by {method}" in said(tmp_path)
    assert "quant_bits: 4" in said(tmp_path)


def test_weights_that_transformers_unpacks_by_itself_are_not_refused(tmp_path: Path) -> None:
    assert said(folder(tmp_path, model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"})) == ""
