"""How many rows are encoded at a time follows from what is rendered of them, and no byte follows from that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpcft.data import tokenise
from hpcft.data.prepare import prepare
from hpcft.data.rows import Row
from hpcft.data.shapes import Shaped
from hpcft.data.tokenise import together
from tests.data.conftest import Tokenizers
from tests.data.small import chat, request, write_lines


def row(*turns: str) -> Row:
    return Shaped("rows.jsonl", "chat").row(1, chat(*turns))


def batches(rows: list[Row]) -> list[int]:
    return [len(some) for some in together([("train", 1, n, row) for n, row in enumerate(rows)])]


def test_ordinary_rows_are_encoded_256_at_a_time() -> None:
    assert batches([row("what ?" * 20, "and two " * 200, "and ?", "and two " * 200)] * 600) == [256, 256, 88]


@pytest.mark.parametrize(
    "long",
    [
        lambda: row(*["and two " * 200] * 80),
        lambda: Row(text="and two " * 300_000),
        lambda: Shaped("rows.jsonl", "pair").row(
            1, {"prompt": "what ?", "chosen": "and two " * 200_000, "rejected": "and two " * 200_000}
        ),
    ],
)
def test_long_rows_are_encoded_few_at_a_time(long: Callable[[], Row]) -> None:
    sizes = batches([long()] * 20)
    assert sum(sizes) == 20
    assert 1 <= max(sizes) <= 4


def test_the_shards_are_the_same_however_many_rows_are_encoded_at_a_time(
    tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(*["what ?", "the answer is " + "and two " * (n % 7)] * (1 + n % 3)) for n in range(40)]
    data = request(write_lines(tmp_path / "rows.jsonl", rows), tokenizer=tokenizer())
    made = []
    for largest in (tokenise.LARGEST, 300):
        monkeypatch.setattr(tokenise, "LARGEST", largest)
        folder = prepare(data, tmp_path / f"store{largest}").folder
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
