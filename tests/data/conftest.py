"""Tokenizers are made once a session; a data set is prepared in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcft.data.prepare import prepare
from hpcft.data.shards import Prepared, open_prepared
from tests.data.small import request, write_lines, write_tokenizer

Tokenizers = Callable[..., Path]
Preparing = Callable[..., Prepared]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """``tokenizer(template)``: the folder of a tokenizer with the chat template of that name."""
    folders: dict[str | None, Path] = {}

    def folder(template: str | None = "chatml") -> Path:
        if template not in folders:
            folders[template] = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)
        return folders[template]

    return folder


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizers) -> Preparing:
    """``prepared(records, template=…, **data)``: the shards of these records, read back."""

    def make(records: list[Any], template: str | None = "chatml", **changes: Any) -> Prepared:
        path = write_lines(tmp_path / "rows.jsonl", records)
        data = request(path, **{"tokenizer": tokenizer(template), **changes})
        prepare(data, tmp_path / "store")
        return open_prepared(tmp_path / "store", data)

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real records, which the project does not carry."""
    folder = Path(os.environ.get("HPCFT_REAL_DATA", "../shared/data"))
    if not (folder / "alpaca_en_demo.json").is_file():
        pytest.skip(f"no real records in {folder}: set HPCFT_REAL_DATA to a folder with alpaca_en_demo.json")
    return folder
