"""Rows that the template refuses are told several at a time, the same ones for any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.data import refused
from hpcft.data.prepare import prepare
from hpcft.data.refused import Refused, found
from hpcft.errors import Refusal
from tests.data.small import chat, request, write_lines, write_tokenizer
from tests.data.test_malformed import STRICT

UNEVEN = {"messages": [{"role": "user", "content": word} for word in ("a", "b")] + chat("c", "d")["messages"][1:]}


def refusal_of(rows: list[dict[str, object]], tokenizer: Path, store: Path, workers: int = 1) -> Refusal:
    path = write_lines(store.parent / "rows.jsonl", rows)
    with pytest.raises(Refusal) as caught:
        prepare(request(path, tokenizer=tokenizer, max_length=512, workers=workers), store)
    return caught.value


@pytest.fixture(scope="module")
def alternating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), text=STRICT)


def test_rows_in_several_portions_are_named_together_and_counted(alternating: Path, tmp_path: Path) -> None:
    rows = [chat(f"what is {n} ?", "the answer is " + "and two " * (n % 40)) for n in range(3000)]
    for at in (1500, 2000, 2900):
        rows[at] = UNEVEN
    one, two = (refusal_of(rows, alternating, tmp_path / f"store-{n}", n) for n in (1, 2))
    assert one.problems == two.problems
    assert [problem.where.rpartition(":")[2] for problem in one.problems[:-1]] == ["1501", "2001", "2901"]
    assert one.problems[-1].what == "3 of the first 3,000 rows cannot be written with the chat template"
    assert not list(tmp_path.rglob("*.npz"))


def test_a_template_that_refuses_every_row_is_told_by_a_few(alternating: Path, tmp_path: Path) -> None:
    refusal = refusal_of([UNEVEN] * 500, alternating, tmp_path / "store")
    assert [problem.where.rpartition(":")[2] for problem in refusal.problems[:-1]] == ["1", "2", "3", "4", "5"]
    assert refusal.problems[-1].what.startswith("500 of the first 500 rows")


def test_of_a_large_file_only_some_portions_behind_the_first_such_row_are_looked_at(
    alternating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused, "FURTHER", 1)
    rows = [chat("what ?", "and two " * 40) for _ in range(3000)]
    rows[0] = rows[-1] = UNEVEN
    refusal = refusal_of(rows, alternating, tmp_path / "store")
    assert [problem.where.rpartition(":")[2] for problem in refusal.problems] == ["1"]


def test_no_such_row_is_no_refusal() -> None:
    so_far = Refused()
    for _ in range(100):
        so_far.add("rows.jsonl", found([]), 10)
    so_far.check()
