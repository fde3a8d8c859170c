"""The catalog and the folders agree: every row has its module, every module its row, and the docs name them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hpcft import catalog

ROOT = Path(__file__).resolve().parent.parent
TABLES = {
    "hpcft/train/strategies": {row.module for row in catalog.STRATEGIES.values()},
    "hpcft/train/objectives": {row.module for row in catalog.OBJECTIVES.values()},
    "hpcft/data/formats": {row.module for row in catalog.FORMATS.values()},
}


@pytest.mark.parametrize("folder", TABLES)
def test_rows_and_modules_are_the_same(folder: str) -> None:
    files = sorted(file for file in (ROOT / folder).glob("*.py") if file.stem != "__init__")
    assert files, folder
    assert TABLES[folder] == {f"{folder.replace('/', '.')}.{file.stem}" for file in files}


@pytest.mark.parametrize("table", ["STRATEGIES", "OBJECTIVES", "FORMATS"])
def test_a_row_stands_under_its_own_name_with_a_sentence(table: str) -> None:
    for name, row in getattr(catalog, table).items():
        assert (name, bool(row.about)) == (row.name, True)
        assert importlib.util.find_spec(row.module) is not None, row.module


@pytest.mark.parametrize("table", ["STRATEGIES", "OBJECTIVES", "FORMATS"])
def test_every_row_is_named_in_the_docs(table: str) -> None:
    docs = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.md"))
    assert [name for name in getattr(catalog, table) if f"`{name}`" not in docs] == []


def test_a_word_for_later_is_not_one_that_exists() -> None:
    assert not set(catalog.LATER_OBJECTIVES) & set(catalog.OBJECTIVES)
