"""An export is the trained model, loadable by plain transformers and peft, or it is not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
)

from hpcft.catalog import OBJECTIVES
from hpcft.data.documents import Document
from hpcft.data.encode import Encoder
from hpcft.data.prepare import prepare
from hpcft.data.rows import Row
from hpcft.data.shards import open_prepared
from hpcft.errors import Refusal
from hpcft.plan.plan import Plan, Source
from hpcft.run import manifest as manifests
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, merging, weights, world
from hpcft.train.export import Wish, export, main
from hpcft.train.metrics import read_metrics
from hpcft.train.quantise import quantise_now
from hpcft.train.signals import Signals
from hpcft.train.speech import speech
from hpcft.train.weights import Unfaithful
from tests import plans, tiny
from tests.train import small

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[5, 9, 40, 12, 77, 3, 60, 21, 8, 90]])
TIGHT: dict[str, Any] = {"rtol": 0.0, "atol": 2e-6}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"


@dataclass(frozen=True)
class Trained:
    """A run that has ended: its plan, its folder, and the logits its own model gave for IDS at the end."""

    plan: Plan
    paths: RunPaths
    logits: torch.Tensor

    def export(self, **wish: Any) -> Path:
        return export(self.paths, Wish(**wish))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submit directory: a tied and an untied base with weights and a tokenizer, records, a template of one's own."""
    folder = tmp_path_factory.mktemp("site")
    rows = tiny.records(40)
    tiny.write_records(folder / "train.jsonl", rows)
    (folder / "own.jinja").write_text(TEMPLATE)
    for name, tied in (("untied", False), ("tied", True)):
        model = tiny.write_model(folder / name, (json.dumps(row) for row in rows), vocabulary=300, hidden=32)
        config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": tied, "use_cache": True}
        (model / "config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.eos_token = "<|endoftext|>"  # as base models have it: not what ends a chat's turn
        tokenizer.save_pretrained(model)
        write_weights(model)
    return folder


def write_weights(folder: Path) -> None:
    from transformers import AutoConfig

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and "bias" not in name:
                parameter.mul_(4)  # so that logits are of the size of a trained model's, and rounding is seen
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)


@pytest.fixture(autouse=True)
def _in_the_submit_directory(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    monkeypatch.setenv("HPCFT_STORE", "prepared")


RUNS: dict[str, Trained] = {}


def trained(site: Path, name: str, base: str = "untied", **changes: Any) -> Trained:
    """A run of four real steps with checkpoints after two and four, trained once per session."""
    if name not in RUNS:
        tuner = {"kind": "lora", "dropout": 0.1, "rank": 4, **changes.pop("tuner", {})}
        plan = plans.plan(
            name=name,
            model={"path": base, "from_scratch": False, **changes.pop("model", {})},
            data={"tokenizer": base, "max_length": 128, **changes.pop("data", {})},
            tuner=tuner,
            optim={"learning_rate": 2e-2, "max_steps": 4},
            **changes,
        )
        RUNS[name] = run(plan, RunPaths(site / "runs" / name))
    return RUNS[name]


def run(plan: Plan, paths: RunPaths) -> Trained:
    paths.root.mkdir(parents=True)
    paths.plan.write_text(plan.to_json())
    prepare(plan.data, Path("prepared"))
    environ, signals = small.environment(0, 1, 0), Signals()
    here = world.join(plan, environ)
    whole = assemble.assemble(plan, paths, here, signals, environ, prepared=open_prepared(Path("prepared"), plan.data))
    assert loop.train(whole)
    whole.metrics.close()
    return Trained(plan, paths, logits(whole.sharded.model))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def base_of(run: Trained) -> Any:
    return AutoModelForCausalLM.from_pretrained(run.plan.model.path, dtype=torch.float32)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "hpcft.json").read_text()))


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_an_adapter_loaded_by_plain_peft_gives_the_trained_models_logits(site: Path, base: str) -> None:
    run = trained(site, f"lora-{base}", base)
    folder = run.export()
    assert (logits(base_of(run)) - run.logits).abs().max() > 0.1, "nothing was learned, so nothing would be seen"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base_of(run), folder)), run.logits, **TIGHT)
    by_name = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(by_name), run.logits, **TIGHT)
    assert config_of(folder)["base_model_name_or_path"] == base
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 7 * 2  # A and B of seven linear layers in two blocks


@pytest.mark.parametrize(
    ("base", "name", "tuner"),
    [
        ("untied", "head", {"modules_to_save": ("lm_head",)}),
        ("tied", "head", {"modules_to_save": ("lm_head",)}),
        ("tied", "embedding", {"modules_to_save": ("embed_tokens",)}),
        ("tied", "adapted-embedding", {"target_modules": ("q_proj", "embed_tokens")}),
        ("untied", "dora", {"use_dora": True, "use_rslora": True}),
        ("untied", "biases", {"bias": "all"}),
        ("untied", "pissa", {"init_lora_weights": "pissa"}),
        ("tied", "olora", {"init_lora_weights": "olora", "use_rslora": True}),
    ],
)
def test_every_kind_of_adapter_comes_out_right_apart_and_merged(site: Path, base: str, name: str, tuner: Any) -> None:
    run = trained(site, f"{name}-{base}", base, tuner=tuner)
    apart = PeftModel.from_pretrained(base_of(run), run.export())
    torch.testing.assert_close(logits(apart), run.logits, rtol=0.0, atol=2e-5)
    merged = AutoModelForCausalLM.from_pretrained(run.export(merge=True), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), run.logits, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_a_whole_model_loads_with_plain_transformers_and_gives_the_trained_logits(site: Path, base: str) -> None:
    run = trained(site, f"full-{base}", base, tuner={"kind": "full"})
    folder = run.export()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.float32, "the type of its base"
    assert model.config.use_cache, "the trainer turns the cache off for itself, not for those who use the model"
    torch.testing.assert_close(logits(model), run.logits, **TIGHT)
    half = AutoModelForCausalLM.from_pretrained(run.export(dtype="bfloat16", output=folder.parent / "half"))
    assert half.dtype is torch.bfloat16
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(half.get_parameter(name), parameter.to(torch.bfloat16), rtol=0.0, atol=0.0)


def test_a_model_from_scratch_is_exported_whole_and_its_adapter_only_merged(site: Path) -> None:
    run = trained(site, "scratch", model={"from_scratch": True}, tuner={"kind": "full"})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(run.export())), run.logits, **TIGHT)
    lora = trained(site, "scratch-lora", model={"from_scratch": True})
    with pytest.raises(Refusal, match="written nowhere") as refusal:
        lora.export()
    assert "--merge" in str(refusal.value)
    merged = AutoModelForCausalLM.from_pretrained(lora.export(merge=True))
    torch.testing.assert_close(logits(merged), lora.logits, rtol=0.0, atol=2e-5)


def test_a_model_from_scratch_that_is_written_in_bfloat16_keeps_its_exact_rotations(site: Path) -> None:
    run = trained(site, "scratch-half", model={"from_scratch": True, "dtype": "bfloat16"}, tuner={"kind": "full"})
    assert AutoModelForCausalLM.from_pretrained(run.export(dtype="bfloat16")).dtype is torch.bfloat16


def test_a_model_without_masters_is_written_as_it_was_trained_and_its_card_says_so(site: Path) -> None:
    lean = {"dtype": "bfloat16", "main_params_dtype": "bfloat16"}
    run = trained(site, "lean", model=lean, tuner={"kind": "full"})
    folder = run.export(dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), run.logits, rtol=2e-2, atol=2e-2 * float(run.logits.abs().max()))
    assert "weights and AdamW's moments in bfloat16, bfloat16 compute" in (folder / "README.md").read_text()


def test_merging_reports_the_change_that_its_type_makes(site: Path) -> None:
    run = trained(site, "lora-untied")
    exact = facts_of(run.export(merge=True))["merge"]
    assert 0 <= exact["largest"] < 1e-5 * exact["scale"]
    assert exact["same"] == exact["positions"] > 40
    folder = run.export(merge=True, dtype="bfloat16", output=site / "merged-bfloat16")
    told = facts_of(folder)["merge"]
    first = open_prepared(Path("prepared"), run.plan.data).train
    samples = [w.tokens[: min(w.documents[0], 64)].tolist() for w in (first[i] for i in range(min(4, len(first))))]
    apart = PeftModel.from_pretrained(base_of(run), run.export())
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = weights.compare(weights.logits(apart, samples), weights.logits(merged, samples))
    assert told["largest"] == pytest.approx(seen.largest, rel=1e-3)
    assert told["largest"] > 100 * exact["largest"], "rounding weights to bfloat16 must be seen"
    assert f"{told['largest']:.3g}" in (folder / "README.md").read_text()


def test_an_adapter_of_a_base_in_four_bits_gives_the_trained_logits_and_says_what_quantisation_costs(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = trained(site, "nf4", model={"quantization": "nf4"})
    folder = export(run.paths, Wish(), said.append)
    told = facts_of(folder)
    assert told["base"]["quantization"] == "nf4"
    assert told["reload"]["largest"] < 1e-5 * told["reload"]["scale"]
    apart = PeftModel.from_pretrained(base_of(run), folder)
    error = float((logits(apart) - run.logits).abs().max())
    assert error > 0.01, "the base was another one in training"
    assert 0.1 * error < told["quantised"]["largest"] < 10 * error
    assert any(f"differs by {told['quantised']['largest']:.3g}" in sentence for sentence in said)
    quantise_now(apart, "nf4", torch.float32)
    torch.testing.assert_close(logits(apart), run.logits, **TIGHT)
    card = (folder / "README.md").read_text()
    assert "base in 4 bits (NormalFloat, double quantisation)" in card
    assert f"{told['quantised']['largest']:.3g}" in card
    snippet = card.split("```")[1].removeprefix("python\n").replace('folder = "."', f"folder = {str(folder)!r}")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # its kernels want rows of 64
    names: dict[str, Any] = {"print": said.append}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["base"].is_loaded_in_4bit
    torch.testing.assert_close(logits(names["model"]), run.logits, **TIGHT)


def test_an_adapter_of_a_base_in_eight_bits_says_what_those_cost(site: Path) -> None:
    said: list[str] = []
    run = trained(site, "fp8", model={"quantization": "fp8"})
    folder = export(run.paths, Wish(), said.append)
    told = facts_of(folder)
    apart = PeftModel.from_pretrained(base_of(run), folder)
    error = float((logits(apart) - run.logits).abs().max())
    assert 0.1 * error < told["quantised"]["largest"] < 10 * error
    assert any("trained on a base in 8-bit floats" in sentence for sentence in said)
    quantise_now(apart, "fp8", torch.float32)
    torch.testing.assert_close(logits(apart), run.logits, **TIGHT)
    card = (folder / "README.md").read_text()
    assert "base in 8-bit floats" in card
    assert "four_bits" not in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_takes_the_original_base_as_peft_would(site: Path, dtype: str) -> None:
    run = trained(site, f"nf4-{dtype}", model={"quantization": "nf4", "dtype": dtype})
    folder = run.export(merge=True)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base_of(run), run.export()).merge_and_unload()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0.0, atol=1e-6)
    told = facts_of(folder)
    assert told["merge"]["largest"] < 1e-5 * told["merge"]["scale"]
    assert told["quantised"]["largest"] > 100 * told["merge"]["largest"], "told apart from what merging changes"
    assert "Trained on its base in 4 bits" in (folder / "README.md").read_text()


REWARD: dict[str, Any] = {
    "data": {"train": (Source(path="pairs.jsonl"),), "rows": "pair"},
    "train": {"objective": "rm", "objective_module": OBJECTIVES["rm"].module},
}
# name → base, tuner, the base's form; all of them are exported apart, those with adapters merged too
REWARD_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("tied", {"kind": "full"}, {}),
    "full-untied": ("untied", {"kind": "full"}, {}),
    "lora": ("tied", {}, {}),
    "embedding": ("tied", {"modules_to_save": ("embed_tokens",)}, {}),
    "pissa": ("untied", {"init_lora_weights": "pissa"}, {}),
    "scratch": ("untied", {"kind": "full"}, {"from_scratch": True}),
}


def rewarded(site: Path, name: str, base: str, tuner: Any, model: Any, **data: Any) -> Trained:
    pairs = [
        {"prompt": "which colour", "chosen": f"{word} or {word}", "rejected": word, "margin": 0.5}
        for word in (*tiny.WORDS, *(f"old {word}" for word in tiny.WORDS))
    ]
    tiny.write_records(site / "pairs.jsonl", pairs)
    sections = {"data": {**REWARD["data"], **data}, "train": REWARD["train"]}
    return trained(site, f"rm-{name}", base, tuner=dict(tuner), model=dict(model), **sections)


def used(folder: Path, said: list[str]) -> dict[str, Any]:
    """The card's snippet, run as it stands; what it says goes to ``said``."""
    snippet = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {"print": said.append}
    exec(compile(snippet.replace('folder = "."', f"folder = {str(folder)!r}"), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_a_reward_model_loads_with_plain_transformers_and_peft_and_gives_the_trained_rewards(
    site: Path, name: str
) -> None:
    run, said = rewarded(site, name, *REWARD_MODELS[name]), list[Any]()
    assert run.logits.shape == (1, 1)
    names = used(run.export(), said)
    torch.testing.assert_close(logits(names["model"]), run.logits, rtol=0.0, atol=2e-5)
    assert said == [names["model"](**names["inputs"]).logits.item()]
    if run.plan.tuner.kind == "lora":
        merged = AutoModelForSequenceClassification.from_pretrained(run.export(merge=True), dtype=torch.float32)
        torch.testing.assert_close(logits(merged), run.logits, rtol=0.0, atol=2e-5)


def test_a_reward_model_s_folder_says_what_it_is_and_nothing_of_generation(site: Path) -> None:
    run, said = rewarded(site, "lora", *REWARD_MODELS["lora"]), list[str]()
    folder = export(run.paths, Wish(output=site / "rewards"), said.append)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "whose last turn `<|im_end|>` ends" in card
    assert "generat" not in card.lower().replace("generated", "")
    assert not (folder / "generation_config.json").exists()
    assert any(line.startswith("loaded back, its rewards are the trained model's") for line in said)
    assert config_of(folder)["task_type"] == "SEQ_CLS"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (1, 32)


def test_the_score_of_a_reward_model_is_not_in_four_bits(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = rewarded(site, "nf4", "untied", {}, {"quantization": "nf4"})
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    names = used(run.export(), [])
    assert names["base"].is_loaded_in_4bit
    torch.testing.assert_close(logits(names["model"]), run.logits, **TIGHT)


def test_texts_of_several_lengths_are_scored_at_once_as_each_alone(site: Path) -> None:
    run = rewarded(site, "full", *REWARD_MODELS["full"])
    model, tokenizer = (
        kind.from_pretrained(run.export()) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    texts = ["which colour<|im_end|>\n", "red<|im_end|>\n"]
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("template", [None, "open.jinja"])
def test_the_card_scores_a_chat_as_training_wrote_it_to_its_last_token(site: Path, template: str | None) -> None:
    (site / "open.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    run = rewarded(site, f"ends-{template}", *REWARD_MODELS["full"], chat_template=template)
    names = used(run.export(), [])
    document = Encoder(run.plan.data, names["tokenizer"]).documents([Row(messages=tuple(names["chat"]))])[0]
    assert isinstance(document, Document)
    assert document.end_added == bool(template)
    assert names["inputs"]["input_ids"].tolist() == [document.tokens.tolist()]


CLASSIFIERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "full": ("tied", {"kind": "full"}, {}, False),
    "lora": ("untied", {}, {}, True),
    "nf4": ("untied", {}, {"quantization": "nf4"}, False),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_loads_with_plain_transformers_and_peft_and_names_its_classes(
    site: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuner, model, chats = CLASSIFIERS[name]
    words = [f"{how} {word}" for how in ("old", "new") for word in tiny.WORDS]
    texts = [[{"role": "user", "content": word}] if chats else word for word in words]
    labels = [("plain", "bright", "dark")[n % 3] for n in range(len(words))]
    rows = [{"messages" if chats else "text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    tiny.write_records(site / f"classes-{name}.jsonl", rows)
    data = {"train": (Source(path=f"classes-{name}.jsonl"),), "rows": "labelled"}
    task = {"objective": "seq_cls", "objective_module": OBJECTIVES["seq_cls"].module}
    run = trained(site, f"cls-{name}", base, tuner=tuner, model=model, data=data, train=task)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # its kernels want rows of 64
    names, said = used(folder := run.export(), list[str]()), list[str]()
    torch.testing.assert_close(logits(names["model"]), run.logits, rtol=0.0, atol=2e-5)
    assert run.logits.shape == (1, 3)
    assert names["model"].config.id2label == {0: "bright", 1: "dark", 2: "plain"}
    assert "3 classes: `bright`, `dark`, `plain`" in (folder / "README.md").read_text()
    used(folder, said)
    assert said == [names["model"].config.id2label[int(names["model"](**names["inputs"]).logits.argmax())]]
    if name == "lora":
        merged = AutoModelForSequenceClassification.from_pretrained(run.export(merge=True), dtype=torch.float32)
        torch.testing.assert_close(logits(merged), run.logits, rtol=0.0, atol=2e-5)
        assert (merged.config.id2label[2], merged.config.problem_type) == ("plain", "single_label_classification")


def test_a_token_that_ends_texts_is_no_padding_of_a_reward_model(site: Path) -> None:
    run = rewarded(site, "full", *REWARD_MODELS["full"])
    words = speech(run.plan, None)
    assert words.padding is not None
    words.tokenizer.pad_token = "<|im_end|>"
    assert words.padding is None


def test_the_folder_stops_where_the_chats_turns_ended_and_has_the_chat_template(site: Path) -> None:
    run = trained(site, "lora-untied")
    folder = run.export()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [eos, end]
    assert facts_of(folder)["learned_stop_tokens"] == {"<|im_end|>": 40}

    class Ends(LogitsProcessor):
        """A model that ends its turn at once."""

        def __call__(self, ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
            return torch.full_like(scores, -100.0).index_fill_(1, torch.tensor([end]), 0.0)

    merged = AutoModelForCausalLM.from_pretrained(run.export(merge=True))
    assert merged.generate(IDS, max_new_tokens=8, logits_processor=[Ends()]).shape[1] == IDS.shape[1] + 1


def test_the_template_that_the_plan_gives_is_the_one_in_the_folder(site: Path) -> None:
    run = trained(site, "own-template", data={"chat_template": "own.jinja"}, tuner={"target_modules": ("q_proj",)})
    folder = run.export()
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert facts_of(folder)["learned_stop_tokens"] == {"<|im_end|>": 40}


def test_without_the_prepared_data_the_stop_token_is_found_by_writing_a_turn(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCFT_STORE", "elsewhere")
    folder = trained(site, "lora-untied").export(output=site / "no-store")
    assert facts_of(folder)["learned_stop_tokens"] == {"<|im_end|>": 0}
    assert facts_of(folder)["stop_tokens"].keys() == {"<|endoftext|>", "<|im_end|>"}


def test_the_cards_facts_are_the_runs(site: Path) -> None:
    run = trained(site, "lora-untied")
    folder = run.export(checkpoint="2")
    card, facts = (folder / "README.md").read_text(), facts_of(folder)
    line = next(line for line in read_metrics(run.paths.metrics) if line["step"] == 2)
    manifest = manifests.read(run.paths.checkpoint(2))
    assert folder == run.paths.export(2)
    assert facts["losses"] == {"loss": line["loss"], "loss_step": 2}
    assert f"{line['loss']:.4f} at step 2" in card
    assert facts["plan"] == run.plan.fingerprint
    assert facts["data"]["content"] == manifest.data
    assert facts["training"]["trained_tokens"] == manifest.progress["trained_tokens"]
    assert (facts["training"]["step"], facts["training"]["total_steps"]) == (2, 4)
    for fact in ("2 of 4", "train.jsonl", run.plan.fingerprint, manifest.data, f"torch {torch.__version__}"):
        assert fact in card
    assert facts["files"].keys() | {"hpcft.json"} == {path.name for path in folder.iterdir()}
    for name, file in facts["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file["sha256"]


def snippet_of(run: Trained) -> str:
    snippet = (run.export() / "README.md").read_text().split("```")[1].removeprefix("python\n")
    return snippet.replace('folder = "."', f"folder = {str(run.paths.export(4))!r}")


def test_the_cards_snippet_runs_as_it_stands(site: Path) -> None:
    said: list[str] = []
    exec(compile(snippet_of(trained(site, "lora-untied")), "README.md", "exec"), {"print": said.append})
    assert len(said) == 1


def test_the_system_turn_of_training_is_in_the_snippet_and_among_the_facts(site: Path) -> None:
    run = trained(site, "with-system", data={"system": "You're Bo,\nwho is brief."})
    said: list[str] = []
    names: dict[str, Any] = {"print": said.append}
    exec(compile(snippet_of(run), "README.md", "exec"), names)
    assert len(said) == 1
    assert names["chat"][0] == {"role": "system", "content": run.plan.data.system}
    assert facts_of(run.paths.export(4))["training"]["system"] == run.plan.data.system
    assert "began with this one: You're Bo,\\nwho is brief." in (run.paths.export(4) / "README.md").read_text()


def test_nothing_of_this_machine_and_no_pickle_is_in_the_folder(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*words: Any, **named: Any) -> Any:
        raise AssertionError("a pickle was read or written")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "dump"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, never)
    run = trained(site, "lora-untied")
    for number, wish in enumerate(({}, {"merge": True})):
        folder = run.export(output=site / f"private-{number}", **wish)
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}
        for path in folder.iterdir():
            assert str(site).encode() not in path.read_bytes(), path.name


def test_the_same_export_is_found_again_and_another_one_is_never_overwritten(site: Path) -> None:
    said: list[str] = []
    run = trained(site, "lora-untied")
    place = site / "once"
    run.export(output=place)
    before = (place / "hpcft.json").stat().st_mtime_ns
    assert export(run.paths, Wish(output=place), said.append) == place
    assert "already" in said[0]
    assert (place / "hpcft.json").stat().st_mtime_ns == before
    for other in ({"checkpoint": "2"}, {"merge": True}, {"dtype": "bfloat16"}):
        with pytest.raises(Refusal, match="there is adapter of step 4 as float32 already"):
            run.export(output=place, **other)
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(Refusal, match="not whole"):
        run.export(output=place)
    (site / "mine").mkdir()
    (site / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match="something else"):
        run.export(output=site / "mine")


def test_two_exports_of_the_same_at_once_are_one(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = trained(site, "lora-untied"), list[str]()
    first = run.export(output=tmp_path / "first")

    def written(folder: Path, *about: Any) -> None:
        shutil.copytree(first, folder, dirs_exist_ok=True)
        shutil.copytree(first, tmp_path / "both")  # by the other one, which was faster

    monkeypatch.setattr(sys.modules[export.__module__], "_write", written)
    assert export(run.paths, Wish(output=tmp_path / "both"), said.append) == tmp_path / "both"
    assert "another export" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "first"]


def test_a_broken_checkpoint_is_refused_by_file_and_passed_over_only_when_told(site: Path, tmp_path: Path) -> None:
    shutil.copytree(trained(site, "lora-untied").paths.root, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    said: list[str] = []
    paths = RunPaths(tmp_path / "run")
    file = paths.checkpoint(4) / "state-rank-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(Refusal, match="bytes are not what was written") as refusal:
        export(paths, Wish())
    assert str(file) in str(refusal.value)
    assert "step-000002: --fallback takes it" in str(refusal.value)
    assert not paths.exports.exists()
    folder = export(paths, Wish(fallback=True), said.append)
    assert folder == paths.export(2)
    assert facts_of(folder)["export"]["step"] == 2
    assert any("taking step-000002 instead" in sentence for sentence in said)


def test_the_best_checkpoint_is_taken_where_the_plan_keeps_one(site: Path, tmp_path: Path) -> None:
    shutil.copytree(trained(site, "lora-untied").paths.root, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    paths = RunPaths(tmp_path / "run")
    with pytest.raises(Refusal, match="no such checkpoint"):
        export(paths, Wish(checkpoint="best"))
    paths.best.write_text("step-000002\n")
    assert export(paths, Wish(checkpoint="best")) == paths.export(2)
    keeps = Plan.from_json(paths.plan.read_text())
    paths.plan.write_text(plans.dataclasses.replace(
        keeps, checkpoint=plans.dataclasses.replace(keeps.checkpoint, load_best_at_end=True)).to_json())  # fmt: skip
    assert export(paths, Wish()) == paths.export(2)
    assert export(paths, Wish(checkpoint=str(paths.checkpoint(4)))) == paths.export(4)


def test_what_cannot_be_exported_is_refused_in_words(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = trained(site, "full-untied", tuner={"kind": "full"})
    with pytest.raises(Refusal, match="no adapter to merge"):
        full.export(merge=True)
    with pytest.raises(Refusal, match="no such checkpoint") as refusal:
        full.export(checkpoint="3")
    assert "latest, 4, 2" in str(refusal.value)
    assert main(["--run", "runs/full-untide"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "no such run" in streams.err
    assert "did you mean" in streams.err
    empty = RunPaths(site / "empty")
    empty.root.mkdir()
    empty.plan.write_text(full.plan.to_json())
    with pytest.raises(Refusal, match="no checkpoint yet"):
        export(empty, Wish())


def test_an_export_that_is_not_the_trained_model_is_not_published(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = trained(site, "lora-untied"), site / "never"
    honest = weights._reloaded_adapter

    def spoiled(*arguments: Any) -> Any:
        model = honest(*arguments)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(1.01)
        return model

    monkeypatch.setattr(weights, "_reloaded_adapter", spoiled)
    assert main(["--run", str(run.paths.root), "--output", str(place)]) == 1
    assert "differs" in capsys.readouterr().err
    monkeypatch.setattr(merging, "merge", lambda model: model.unload())
    with pytest.raises(Unfaithful, match="more than rounding explains"):
        run.export(merge=True, output=place)
    assert not place.exists()
    assert not list(site.glob(".tmp-*"))


def test_a_base_that_changed_since_the_run_began_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(site, "lora-untied")
    shutil.copytree(site / "untied", site / "kept")
    try:
        tiny.write_model(site / "untied", ["other words"], vocabulary=300, hidden=64)
        write_weights(site / "untied")
        with pytest.raises(Refusal, match="changed since"):
            run.export(output=site / "changed")
    finally:
        shutil.rmtree(site / "untied")
        os.rename(site / "kept", site / "untied")


def test_from_another_directory_it_says_where_to_type_it(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(site, "lora-untied")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="not seen from this directory") as refusal:
        run.export(output=tmp_path / "out")
    assert f"cd {site}" in str(refusal.value)


def test_an_adapter_taken_out_of_a_rounded_base_says_what_that_costs(site: Path) -> None:
    said: list[str] = []
    run = trained(site, "pissa-bfloat16", model={"dtype": "bfloat16"}, tuner={"init_lora_weights": "pissa"})
    folder = export(run.paths, Wish(), said.append)
    reload = facts_of(folder)["reload"]
    assert 0 < reload["largest"] < 0.05 * reload["scale"]
    assert any(f"differ by {reload['largest']:.2g}" in sentence for sentence in said)


def test_a_cast_that_moves_logits_too_far_is_warned_about_and_one_that_breaks_them_refused() -> None:
    scale, positions = 8.0, 10
    usual, far = weights.Change(0.05, scale, positions, 10), weights.Change(0.8, scale, positions, 7)
    assert merging.cast_warnings(usual, torch.bfloat16) == ()
    [warning] = merging.cast_warnings(far, torch.bfloat16)
    assert "0.8 of 8" in warning
    with pytest.raises(Unfaithful, match="do not fit into float16"):
        merging.cast_warnings(weights.Change(float("inf"), scale, positions, 0), torch.float16)


def test_an_adapter_that_learned_nothing_is_warned_about_and_an_empty_one_is_refused() -> None:
    moved, still = torch.ones(2, 2), torch.zeros(2, 2)
    assert weights.check_adapter({"a.lora_A.weight": still, "a.lora_B.weight": moved}) == ()
    [warning] = weights.check_adapter({"a.lora_B.weight": moved, "b.lora_B.weight": still})
    assert "1 of 2 lora_B are all zeros, b.lora_B.weight" in warning
    with pytest.raises(Unfaithful, match="empty"):
        weights.check_adapter({"a.lora_A.weight": torch.empty(0)})


def test_as_a_process_of_its_own_it_prints_the_folder_and_nothing_else_on_stdout(site: Path) -> None:
    run = trained(site, "lora-untied")
    command = [sys.executable, "-m", "hpcft.train.export", "--run", "runs/lora-untied", "--output", "by-process"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{site / 'by-process'}\n"
    for expected in ("hf upload", "adapter_model.safetensors", "<|im_end|>"):
        assert expected in done.stderr
    for noise in ("Traceback", "Warning"):
        assert noise not in done.stderr
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base_of(run), site / "by-process")), run.logits, **TIGHT
    )


def test_no_library_says_anything_on_the_stdout_of_an_export(site: Path) -> None:
    trained(site, "full-tied", "tied", tuner={"kind": "full"})
    command = [sys.executable, "-m", "hpcft.train.export", "--run", "runs/full-tied", "--output", "in-silence"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=site, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{site / 'in-silence'}\n"
