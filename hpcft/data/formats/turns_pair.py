"""A conversation up to a question, and a ``chosen`` and a ``rejected`` answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import CHOSEN_AND_REJECTED
from hpcft.data.answers import after, answer, pair
from hpcft.data.rows import Row
from hpcft.data.turns import conversation, shared_gpt
from hpcft.data.values import Unusable


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    turns = conversation(record["messages"], "messages") if "messages" in record else shared_gpt(record)
    keys = next(keys for keys in CHOSEN_AND_REJECTED if set(keys) <= set(record))
    answers = [answer(record, key) for key in keys]
    if turns[-1]["role"] == "assistant":
        if any(answer[0]["role"] == "assistant" for answer in answers):
            raise Unusable(
                f"the conversation ends with the assistant's words, so `{keys[0]}` and `{keys[1]}` answer nothing",
                hint="end it with the turn that is answered",
            )
        turns = turns[:-1]
    return pair(record, *(after(turns, answer, key) for answer, key in zip(answers, keys, strict=True)))
