"""Hub names become the files of their split, from the cache alone; what is not there is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.data.files import records
from hpcft.data.sources import data_files
from hpcft.errors import Refusal
from hpcft.plan.plan import Source

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of dataset us/chats in a Hugging Face cache made by hand."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--us--chats" / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "two and two"}\n')


def found(split: str = "train", subset: str | None = None) -> list[str]:
    source = Source(path="us/chats", source="huggingface", revision=REVISION, split=split, subset=subset)
    files = data_files(source)
    assert all(file.pinned and file.path.is_file() for file in files)
    return [file.shown.removeprefix("us/chats/") for file in files]


def test_files_named_by_split_go_to_their_split(hub: Path) -> None:
    put(hub, "data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-0.jsonl", "val.json")
    assert found() == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert found("test") == ["data/test-0.jsonl"]
    assert found("validation") == ["val.json"]


def test_files_that_speak_of_no_split_are_all_train(hub: Path) -> None:
    put(hub, "a.jsonl", "b.jsonl.gz", "README.md", "dataset_infos.json")
    assert found() == ["a.jsonl", "b.jsonl.gz"]


def test_what_the_card_declares_goes_before_names(hub: Path) -> None:
    put(hub, "en/one.jsonl", "en/two.jsonl", "zh/train.jsonl")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: zh\n  data_files: zh/*.jsonl\n- config_name: en\n  default: true\n"
        "  data_files:\n  - split: train\n    path: en/one.jsonl\n  - split: test\n    path: [en/two.jsonl]\n---\n"
    )
    assert found() == ["en/one.jsonl"]
    assert found("test") == ["en/two.jsonl"]
    assert found(subset="zh") == ["zh/train.jsonl"]


SEVERAL = (
    "---\nconfigs:\n- config_name: main\n  data_files: main/*\n- config_name: socratic\n  data_files: socratic/*\n---\n"
)


def test_of_several_subsets_without_a_default_one_has_to_be_named(hub: Path) -> None:
    put(hub, "main/train.jsonl", "socratic/train.jsonl")
    (hub / "README.md").write_text(SEVERAL)
    with pytest.raises(Refusal, match="has several subsets") as refusal:
        found()
    assert refusal.value.problems[0].choices == ("main", "socratic")
    assert "us/chats:main" in refusal.value.problems[0].hint
    assert found(subset="socratic") == ["socratic/train.jsonl"]


@pytest.mark.parametrize("change", [("socratic\n", "default\n"), ("socratic\n", "socratic\n  default: true\n")])
def test_a_subset_that_is_the_default_by_name_or_word_is_taken(change: tuple[str, str], hub: Path) -> None:
    put(hub, "main/train.jsonl", "socratic/train.jsonl")
    (hub / "README.md").write_text(SEVERAL.replace(*change))
    assert found() == ["socratic/train.jsonl"]


def test_a_subset_is_a_folder_when_the_card_is_silent(hub: Path) -> None:
    put(hub, "en/a.jsonl", "zh/a.jsonl")
    assert found(subset="zh") == ["zh/a.jsonl"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(hub: Path) -> None:
    put(hub, "train.jsonl", "test.jsonl")
    with pytest.raises(Refusal, match="no data files for split validation") as refusal:
        found("validation")
    assert refusal.value.problems[0].choices == ("test", "train")


def test_a_dataset_that_was_not_downloaded_is_refused_without_the_network(hub: Path) -> None:
    with pytest.raises(Refusal, match="dataset us/other of huggingface is not on this machine"):
        data_files(Source(path="us/other", source="huggingface", revision=REVISION))


def test_modelscope_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(Refusal, match="pip install modelscope"):
        data_files(Source(path="AI-ModelScope/alpaca-gpt4-data-zh", source="modelscope"))


def test_a_local_path_is_the_file_it_names(tmp_path: Path) -> None:
    put(tmp_path, "with space & 'quote'.jsonl")
    (file,) = data_files(Source(path=str(tmp_path / "with space & 'quote'.jsonl")))
    assert [row for _, row in records(file.path, file.shown)] == [{"text": "two and two"}]
    assert not file.pinned
