"""A conversation that is much too long is dropped before anybody looks for what is trained in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from hpcft.data import encode
from hpcft.data.documents import KEPT, TOO_LONG, Document
from hpcft.data.encode import Encoder
from hpcft.data.masks import Masker
from hpcft.data.rows import Row
from hpcft.data.shapes import Shaped
from tests.data import masked
from tests.data.small import chat


def agent(calls: int, words: str = "the answer is that two and two are four") -> dict[str, Any]:
    """A conversation of so many calls of a tool."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "What are two and three?"}]
    for n in range(calls):
        turns += [{"role": "assistant", "content": "", "tool_calls": [masked.CALL]}]
        turns += [{"role": "tool", "content": f"{n}: {words}"}]
    return {"tools": [masked.TOOL], "messages": [*turns, {"role": "assistant", "content": "Five."}]}


def row(record: dict[str, Any]) -> Row:
    return Shaped("rows.jsonl", "chat").row(1, record)


def encoder(limit: int, policy: str = "drop") -> Encoder:
    made, tokenizer = masked.encoder("hermes")
    return Encoder(dataclasses.replace(made.data, max_length=limit, truncation=policy), tokenizer)


def documents(record: dict[str, Any], limit: int, policy: str = "drop") -> Document | str:
    return encoder(limit, policy).documents([row(chat("What ?", "Two.")), row(record), row(chat("And ?", "Two."))])[1]


@pytest.mark.parametrize("policy", ["drop", "split"])
@pytest.mark.parametrize("record", [agent(40), chat(*["what is it that you say ?", "two and two are four"] * 40)])
def test_it_is_dropped_without_a_mask_and_as_if_there_had_been_one(
    record: dict[str, Any], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought: list[int] = []
    spans = Masker.spans

    def counted(self: Masker, messages: Sequence[Any], tools: Sequence[Any] | None) -> Any:
        sought.append(len(messages))
        return spans(self, messages, tools)

    monkeypatch.setattr(Masker, "spans", counted)
    early = documents(record, 64, policy)
    assert sought == [2, 2]
    monkeypatch.setattr(encode, "FEW", 1000)
    late = documents(record, 64, policy)
    assert sought[2:] == [2, len(record["messages"]), 2]
    assert isinstance(early, Document)
    assert isinstance(late, Document)
    assert (early.fate, early.length, early.why) == (TOO_LONG, late.length, late.why)


def test_one_that_only_seemed_too_long_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    record = chat(*["what ?", "<|im_start|>" * 40] * 6)  # a token of twelve characters
    kept = documents(record, 400)
    assert isinstance(kept, Document)
    assert kept.fate == KEPT
    assert sum(len(turn["content"]) for turn in record["messages"]) > encode.A_TOKEN * 400


def test_one_that_is_to_be_cut_has_its_mask() -> None:
    cut = documents(agent(40), 64, "truncate_left")
    assert isinstance(cut, Document)
    assert (cut.fate, cut.truncated, len(cut.tokens)) == (KEPT, True, 64)
