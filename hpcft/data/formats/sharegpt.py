"""``conversations``: turns with from and value, or ms-swift's list of {human, assistant} pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Message, Row, conversation, listing, question_and_answer, tools, with_system, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    key = "conversations" if "conversations" in record else "conversation"
    turns = listing(record[key], key)
    if turns and all(isinstance(turn, Mapping) and {"human", "assistant"} <= set(turn) for turn in turns):
        return with_system(record, Row(_pairs(turns), tools(record)))
    return with_system(record, Row(conversation(turns, key), tools(record)))


def _pairs(turns: list[Any]) -> tuple[Message, ...]:
    pairs = (question_and_answer(words(turn, "human"), words(turn, "assistant")) for turn in turns)
    return tuple(message for pair in pairs for message in pair)
