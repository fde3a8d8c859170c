"""``prompt`` and ``completion``: TRL's records, each half a text or a list of turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Message, Row, conversation, tools, with_system, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row; turns of the prompt are never trained. Raises Unusable."""
    prompt = tuple({**turn, "loss": False} if _speaks(turn) else turn for turn in _half(record, "prompt", "user"))
    return with_system(record, Row(prompt + _half(record, "completion", "assistant"), tools(record)))


def _half(record: Mapping[str, Any], key: str, role: str) -> tuple[Message, ...]:
    if isinstance(record[key], list | tuple):
        return conversation(record[key], key)
    return ({"role": role, "content": words(record, key)},)


def _speaks(turn: Message) -> bool:
    return bool(turn["role"] == "assistant")
