"""Tokens as the size of files has them; they are shown and never decide."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hpcft.plan.estimate import guessed_tokens
from tests.words import plan


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
