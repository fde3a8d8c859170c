"""What the formats of preference data share: an answer in any spelling, a pair of them, a label, a margin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.data.rows import Category, Message, Row
from hpcft.data.turns import conversation, message, parsed, tools, with_system, words
from hpcft.data.values import Unusable, kind_of

LABELS = {"true": True, "false": False, "1": True, "0": False}
LABEL_KEYS = ("label", "kto_tag")


def pair(record: Mapping[str, Any], chosen: Sequence[Message], rejected: Sequence[Message]) -> Row:
    """The row of two whole conversations, after the record's ``system``. Raises Unusable where they share no prompt.

    Two equal answers are a row: that nothing is to be learned from it is counted with what else cannot be trained.
    """
    row = Row(tuple(chosen), tools(record), rejected=tuple(rejected), margin=margin(record))
    row = with_system(record, row)
    at = row.shared
    parting = (*row.messages[at : at + 1], *row.rejected[at : at + 1])
    if len(parting) == 1:
        raise Unusable("one of the two conversations only goes on where the other ends, so it is no other answer")
    if other := [turn["role"] for turn in parting if turn["role"] != "assistant"]:
        raise Unusable(
            f"the two conversations part in turn {at + 1}, which is the {other[0]}'s",
            hint="both must answer the same prompt: they may differ only from an assistant's turn on",
        )
    return row


def answer(record: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """The turns under ``key``: a text is one assistant turn, as is a single object. Raises Unusable."""
    value = parsed(record[key])
    if value is None:
        raise Unusable(f"`{key}` is null", hint="a pair needs both answers")
    if not isinstance(value, list | tuple | Mapping):
        return ({"role": "assistant", "content": words(record, key)},)
    try:
        turns = (message(value, 1),) if isinstance(value, Mapping) else conversation(value, key)
    except Unusable as error:
        raise Unusable(f"`{key}`: {error}", error.hint) from error
    if all(turn["role"] != "assistant" for turn in turns):
        raise Unusable(f"`{key}` is no answer: its turns are the {turns[-1]['role']}'s, none the assistant's")
    return turns


def after(prompt: Sequence[Message], turns: Sequence[Message], key: str) -> tuple[Message, ...]:
    """The conversation in which ``turns``, of ``key``, answer ``prompt``; they may repeat its end, or all of it."""
    if turns[0]["role"] == "assistant":
        return (*prompt, *turns)
    before, said = ([(turn["role"], turn["content"].strip()) for turn in both] for both in (prompt, turns))
    for repeated in range(len(prompt), 0, -1):
        if before[-repeated:] == said[:repeated]:
            return (*prompt[:-repeated], *turns)
    if before and next((turn for turn in reversed(before) if turn[0] == "user"), before[-1]) not in said:
        raise Unusable(
            f"`{key}` is a conversation about something else than the prompt beside it",
            hint=f"leave the prompt's turns out of `{key}`, or take the prompt out where `{key}` has it",
        )
    return tuple(turns)


def label(record: Mapping[str, Any]) -> bool:
    """Whether the record's answer is a good one. Raises Unusable where its label is neither true nor false."""
    key = next(key for key in LABEL_KEYS if key in record)
    value = record[key]
    known = LABELS.get(value.strip().lower()) if isinstance(value, str) else value if value in (0, 1) else None
    if known is None:
        raise Unusable(
            f"`{key}` is {json.dumps(value, default=str)}, neither true nor false",
            hint="true: a good answer, false: a bad one",
        )
    return bool(known)


def category(record: Mapping[str, Any]) -> Category:
    """The label of the record's class: a name, or a number of at least 0. Raises Unusable for anything else."""
    value = record["label"]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # a column of numbers with a hole in it
        value = int(value)
    if isinstance(value, str) and value.strip():
        return words({"label": value.strip()}, "label")
    if isinstance(value, int) and value >= 0:
        return value
    several = isinstance(value, list | tuple | Mapping)
    raise Unusable(
        f"`label` is {json.dumps(value, ensure_ascii=False, default=str)}, which names no class",
        hint="this release gives a text one class" if several else "write a class's name, or its number from 0 on",
    )


def margin(record: Mapping[str, Any]) -> float | None:
    """By how much the good answer is better; None where the record does not say. Raises Unusable for no number."""
    value = record.get("margin")
    if value in (None, ""):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable(f"`margin` is {kind_of(value)}, not a finite number: {json.dumps(value, default=str)}")
    return number
