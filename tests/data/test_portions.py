"""Records that can only be read one after another are handed out in portions of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.data import portions
from hpcft.data.portions import Piece, cut, pieces
from hpcft.data.sources import DataFile
from tests.data.small import chat


def handed_out(path: Path, records: list[Any]) -> list[Piece]:
    path.write_text(json.dumps(records))
    return list(pieces(cut(DataFile(path, path.name)), "chat", "messages", 1))


def test_ordinary_records_are_a_portion_by_their_number(tmp_path: Path) -> None:
    found = handed_out(tmp_path / "list.json", [chat("what ?", "the answer")] * 2500)
    assert [len(piece.records or ()) for piece in found] == [1024, 1024, 452]
    assert [piece.portion.number for piece in found] == [0, 1, 2]


@pytest.mark.parametrize("shape", ["messages", "text"])
def test_long_records_are_a_portion_by_their_size(shape: str, tmp_path: Path) -> None:
    long = "and two " * 50_000
    record = {"text": long} if shape == "text" else chat("what ?", long)
    found = handed_out(tmp_path / "list.json", [{**record, "id": n} for n in range(100)])
    given = [record for piece in found for _, record in piece.records or ()]
    assert [record["id"] for record in given] == list(range(100))
    assert max(len(piece.records or ()) for piece in found) <= portions.LARGEST // len(long) + 1
