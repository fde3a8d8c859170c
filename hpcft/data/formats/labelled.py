"""A text or turns, and a ``label``: the name or the number of their class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hpcft.catalog import QUERY_WORDS, RESPONSE_WORDS
from hpcft.data.answers import category
from hpcft.data.rows import Message, Row
from hpcft.data.turns import asked, conversation, half, history, shared_gpt, tools, with_system, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    if "messages" not in record and "text" in record:
        found = Row(text=words(record, "text"))
    else:
        found = with_system(record, Row(_turns(record), tools(record)))
    return dataclasses.replace(found, category=category(record))


def _turns(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in record:
        return conversation(record["messages"], "messages")
    if "conversations" in record or "conversation" in record:
        return shared_gpt(record)
    said = next((word for word in RESPONSE_WORDS if word in record), None)
    return (*history(record), *asked(record, QUERY_WORDS), *(half(record, said, "assistant") if said else ()))
