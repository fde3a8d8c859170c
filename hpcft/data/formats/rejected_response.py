"""``messages`` that end in the good answer, and ``rejected_response``: ms-swift's pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.answers import after, answer, pair
from hpcft.data.rows import Message, Row
from hpcft.data.turns import asked, conversation, history, shared_gpt, words
from hpcft.data.values import Unusable


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    chosen = _chosen(record)
    if chosen[-1]["role"] != "assistant":
        raise Unusable("the last turn is not the assistant's", hint="the turns must end with the good answer")
    key = "rejected_response" if record.get("rejected_response") is not None else "rejected_messages"
    turns = answer(record, key if key in record else "rejected_response")
    return pair(record, chosen, after(chosen[: _answered(chosen, turns)], turns, key))


def _chosen(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in record:
        return conversation(record["messages"], "messages")
    if "conversations" in record or "conversation" in record:
        return shared_gpt(record)
    said = {"role": "assistant", "content": words(record, "response")}
    return (*history(record), *asked(record, ("query",)), said)


def _answered(chosen: tuple[Message, ...], turns: tuple[Message, ...]) -> int:
    """Where the rejected ``turns`` go: one turn replaces the last one, several all after the user's last words."""
    if len(turns) == 1:
        return len(chosen) - 1
    return max((n + 1 for n, turn in enumerate(chosen) if turn["role"] == "user"), default=0)
