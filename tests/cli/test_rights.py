"""Files and folders that a person may not read or write are refused with the path and a hint, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.rights import by_mode


def said(line: str, folder: Path) -> str:
    """What ``hpcft`` said when it refused."""
    result = by_mode(line, folder)
    assert "Traceback" not in result.stderr
    assert result.returncode == 2, result
    return result.stderr


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A model and data, and a folder that nobody may enter with the same in it."""
    for folder in (tmp_path, tmp_path / "secret"):
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "cluster.yaml").write_text(
        "name: mine\nscheduler: none\naccelerator: cpu\ncores_per_node: 2\nstore: closed/prepared\n"
    )
    (tmp_path / "closed").mkdir()
    shut = [tmp_path / "secret", tmp_path / "closed"]
    for folder in shut:
        folder.chmod(0o500 if folder.name == "closed" else 0)
    yield tmp_path
    for folder in shut:
        folder.chmod(0o700)


WORDS = "--cluster cluster.yaml --from_scratch true --max_length 64"


@pytest.mark.parametrize("verb", ["submit", "prepare", "inspect"])
def test_a_model_and_data_that_may_not_be_entered_are_named_and_not_called_missing(site: Path, verb: str) -> None:
    text = said(f"{verb} --model ./secret/model --dataset secret/rows.jsonl {WORDS}", site)
    assert f"model: may not be read: permission denied by {site / 'secret'}\n  value: ./secret/model" in text
    assert f"dataset: may not be read: permission denied by {site / 'secret'}\n  value: secret/rows.jsonl" in text
    assert "hint: ls -ld" in text


def test_a_configuration_and_weights_that_may_not_be_read_are_named(site: Path) -> None:
    config, weights = site / "model/config.json", site / "model/model.safetensors"
    weights.write_bytes(b"")
    weights.chmod(0)
    words = WORDS.replace("true", "false")
    assert str(weights.relative_to(site)) in said(f"submit --model ./model --dataset rows.jsonl {words}", site)
    config.chmod(0)
    text = said(f"prepare --model ./model --dataset rows.jsonl {words}", site)
    assert f"permission denied by {config.relative_to(site)}" in text


@pytest.mark.parametrize("verb", ["submit", "prepare"])
def test_a_store_that_may_not_be_written_is_named_with_the_key(site: Path, verb: str) -> None:
    text = said(f"{verb} --model ./model --dataset rows.jsonl {WORDS}", site)
    assert f"the data cannot be prepared: {site / 'closed'} may not be written" in text
    assert "store: in the cluster profile" in text


def test_a_folder_that_may_not_be_written_is_refused_by_every_verb_that_writes(site: Path) -> None:
    assert "denied" in said("init", site / "closed")
    text = said(
        "submit --model ../model --dataset ../rows.jsonl --from_scratch true --nproc_per_node 1", site / "closed"
    )
    assert f"{site / 'closed'} may not be written" in text
