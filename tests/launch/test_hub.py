"""Hub names: pinned, downloaded into the ranks' cache, and refused with the next thing to type. No network."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hpcft.errors import Refusal
from hpcft.launch.hub import config_folder, resolve
from hpcft.plan.plan import Plan, Source, Variable
from tests.plans import plan

SHA = "a" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub library leaves it after a download: one model, one dataset; and no way out."""
    for kind, name, files in (
        ("models", "owner--model", {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}),
        ("models", "owner--pickled", {"config.json": "{}", "pytorch_model.bin": ""}),
        ("datasets", "owner--data", {"train.jsonl": "{}"}),
    ):
        folder = tmp_path / "hub" / f"{kind}--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(SHA)
        (folder / "snapshots" / SHA).mkdir(parents=True)
        for file, text in files.items():
            (folder / "snapshots" / SHA / file).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def named(hub: Path, model: str = "owner/model", source: str = "huggingface", **changes: Any) -> Plan:
    home = Variable(name="HF_HOME", value=str(hub), reason="one copy")
    data = {"tokenizer": model, "tokenizer_source": source, **changes.pop("data", {})}
    return plan(
        model={"path": model, "source": source, "from_scratch": False}, data=data, environment=(home,), **changes
    )


def test_a_plan_of_local_folders_stays_as_it_is() -> None:
    assert resolve(plan()) == plan()


def test_model_tokenizer_and_datasets_are_pinned_from_the_cache_that_the_ranks_read(hub: Path) -> None:
    sources = (Source(path="owner/data", rows=5, source="huggingface"), Source(path="mine.jsonl"))
    found = resolve(named(hub, data={"train": sources}))
    assert found.model.revision == found.data.tokenizer_revision == SHA
    assert [source.revision for source in found.data.train] == [SHA, None]
    assert found.data.train[0].rows == 5


def test_a_run_from_scratch_needs_no_weights_and_a_pickle_is_no_weight(hub: Path) -> None:
    with pytest.raises(Refusal, match="no safetensors weights"):
        resolve(named(hub, "owner/pickled"))
    scratch = named(hub, "owner/pickled")
    scratch = plan(**{"model": {**vars(scratch.model), "from_scratch": True}, "environment": scratch.environment})
    assert resolve(scratch).model.revision == SHA


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            "model.model: model: its weights were quantised beforehand, by awq",
        ),
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
            "model.model: model: this is no decoder of text",
        ),
        (
            {"model_type": "llama", "num_hidden_layers": 1},
            "tuner.target_modules: tuner.target_modules: the model has no such module",
        ),
    ],
)
def test_a_model_that_is_not_trained_here_is_refused_before_its_weights_are_downloaded(
    hub: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], said: str
) -> None:
    asked: list[list[str]] = []
    fetch = huggingface_hub.snapshot_download

    def listening(*names: Any, **words: Any) -> Any:
        asked.append(words["allow_patterns"])
        return fetch(*names, **words)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", listening)
    (hub / f"hub/models--owner--model/snapshots/{SHA}/config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=said):
        resolve(named(hub, tuner={"kind": "lora", "target_modules": ("bar",)}))
    assert asked == [["config.json"]]


def test_every_name_that_cannot_be_had_is_refused_at_once_with_a_hint(hub: Path) -> None:
    data = {"validation": (Source(path="owner/none", source="huggingface"),)}
    with pytest.raises(Refusal) as refused:
        resolve(named(hub, "owner/missing", data=data))
    assert [problem.where for problem in refused.value.problems] == ["model.model", "data.dataset"]
    assert all("HF_HOME" in problem.hint for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("GatedRepoError", "accept its terms at https://huggingface.co/owner/model"),
        ("RepositoryNotFoundError", "is it spelt as at"),
        ("RevisionNotFoundError", "branches, tags and commits"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_page_to_look_at(
    hub: Path, monkeypatch: pytest.MonkeyPatch, error: str, hint: str
) -> None:
    kind = getattr(errors, error)

    def refuse(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(Refusal, match=hint):
        resolve(named(hub))


def test_modelscope_without_its_package_is_refused_with_the_line_that_installs_it(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub", None)
    with pytest.raises(Refusal, match="pip install modelscope"):
        resolve(named(hub, "AI-ModelScope/x", source="modelscope"))


def test_modelscope_is_asked_for_the_same_files(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **words: Any) -> str:
        asked[name] = words
        (hub / "ms").mkdir(exist_ok=True)
        (hub / "ms/model.safetensors").touch()
        return str(hub / "ms")

    package, inner = types.ModuleType("modelscope"), types.ModuleType("modelscope.hub")
    inner.snapshot_download = types.SimpleNamespace(  # type: ignore[attr-defined]
        snapshot_download=fetch, dataset_snapshot_download=fetch
    )
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.hub", inner)
    found = resolve(named(hub, "AI-ModelScope/x", source="modelscope"))
    assert found.model.revision == "master"
    assert "*.safetensors" in asked["AI-ModelScope/x"]["allow_patterns"]


def test_the_shape_of_a_hub_model_is_found_in_the_cache_of_the_profile(hub: Path) -> None:
    def found(name: str, home: str, fetch: bool = False) -> Path | None:
        return config_folder(name, "huggingface", None, home, {"SCRATCH": str(hub)}, fetch)

    assert found("owner/model", "$SCRATCH") == hub / f"hub/models--owner--model/snapshots/{SHA}"
    assert found("owner/other", str(hub)) is None
    with pytest.raises(Refusal, match="owner/other cannot be had"):
        found("owner/other", str(hub), fetch=True)
