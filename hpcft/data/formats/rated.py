"""One answer and a ``label`` (or ``kto_tag``) that says whether it is a good one, in three spellings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hpcft.data.answers import label
from hpcft.data.rows import Message, Row
from hpcft.data.turns import (
    asked,
    conversation,
    half,
    history,
    shared_gpt,
    tools,
    untrained,
    with_system,
    words,
)


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    row = with_system(record, Row(_turns(record), tools(record)))
    return dataclasses.replace(row, label=label(record))


def _turns(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in record:
        return conversation(record["messages"], "messages")
    if "conversations" in record or "conversation" in record:
        return shared_gpt(record)
    if "completion" in record:
        return untrained(half(record, "prompt", "user")) + half(record, "completion", "assistant")
    answer = words(record, "response" if "response" in record else "output")
    return (*history(record), *asked(record, ("query", "instruction")), {"role": "assistant", "content": answer})
