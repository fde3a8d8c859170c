"""A text that is split loses no token, and each is trained once; the audit says what the other policies lose."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hpcft.data.cutting import split
from hpcft.data.documents import KEPT, Document
from hpcft.data.report import table
from tests.data.conftest import Preparing
from tests.data.small import chat

BOOK = {"text": "the answer is that two and two " * 300}
SHORT = [{"text": f"a short text of a few words, number {n}"} for n in range(9)]
SPLIT = {"train_on": "all", "truncation": "split"}


def text(length: int) -> Document:
    """A text of the tokens 0 … whose last one ends it."""
    tokens, ends = np.arange(length, dtype=np.int32), np.array([length - 1])
    return Document(KEPT, length, "", tokens, np.ones(length, np.bool_), ends)


@pytest.mark.parametrize("limit", [2, 3, 7, 64])
def test_every_token_but_the_first_is_trained_once_in_pieces_within_the_limit(limit: int) -> None:
    for length in (2, 3, limit - 1, limit, limit + 1, 2 * limit - 1, 2 * limit, 2 * limit + 1, 10 * limit + 3):
        if length < 2:
            continue
        pieces = split(text(length), limit).records
        assert all(2 <= len(piece.tokens) <= limit for piece in pieces)
        assert not any(piece.trained[0] for piece in pieces)
        trained = [token for piece in pieces for token in piece.tokens[piece.trained].tolist()]
        assert trained == list(range(1, length))
        assert [token for piece in pieces for token in piece.end_tokens] == [length - 1]
        assert (len(pieces) > 1) == (length > limit)


@pytest.mark.parametrize("packing", [True, False])
def test_a_long_text_is_prepared_whole_as_records_of_its_own(packing: bool, prepared: Preparing) -> None:
    whole = prepared([*SHORT, BOOK], max_length=8192, packing=False, **SPLIT)
    shards = prepared([*SHORT, BOOK], max_length=64, packing=packing, **SPLIT)
    trained = Counter(token for window in whole.train for token in window.tokens[window.trained].tolist())
    assert Counter(token for window in shards.train for token in window.tokens[window.trained].tolist()) == trained
    rows, facts = shards.manifest["audit"]["rows"], shards.manifest["splits"]["train"]
    assert (rows["read"], rows["kept"], rows["split"], rows["too_long"]) == (10, 10, 1, 0)
    assert facts["rows"] == 9 + rows["pieces"] == sum(len(window.documents) for window in shards.train)
    assert facts["max_window"] <= 64
    assert {shards.train.origin(n) for n in range(9, facts["rows"])} == {(0, 10)}
    assert shards.manifest["audit"]["end_token"]["turns"] == 10
    assert f"pieces of them  {rows['pieces']}" in table(shards.manifest, ["rows.jsonl"])


def test_a_repeated_text_is_repeated_in_every_piece(prepared: Preparing) -> None:
    once, twice = (prepared([BOOK] * n, max_length=64, packing=False, **SPLIT) for n in (1, 2))
    assert len(twice.train) == 2 * len(once.train) > 2


def test_a_conversation_is_not_split_but_dropped_and_counted(prepared: Preparing) -> None:
    rows = prepared([chat("what ?", "two")] * 9 + [chat("what ?", BOOK["text"])], max_length=64, **SPLIT).manifest[
        "audit"
    ]["rows"]
    assert (rows["kept"], rows["too_long"], rows["split"]) == (9, 1, 0)


def test_the_tokens_of_dropped_rows_are_told_beside_their_number(prepared: Preparing) -> None:
    shards = prepared([*SHORT, BOOK], max_length=64, train_on="all")
    audit = shards.manifest["audit"]
    lost = audit["row_tokens"]["longest"]
    assert audit["dropped_tokens"] == {"too long": lost}
    assert audit["tokens_read"] == lost + shards.manifest["splits"]["train"]["tokens"]
    said = f"dropped: too long  1: {lost:,} tokens, {lost / audit['tokens_read']:.0%} of all"
    assert said in table(shards.manifest, ["rows.jsonl"])
