"""A prompt under any of its names, and a ``chosen`` and a ``rejected`` answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import CHOSEN_AND_REJECTED, PROMPT_WORDS
from hpcft.data.answers import after, answer, pair
from hpcft.data.rows import Message, Row
from hpcft.data.turns import half, history, instruction


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    prompt = (*history(record), *_asked(record))
    keys = next(keys for keys in CHOSEN_AND_REJECTED if set(keys) <= set(record))
    return pair(record, *(after(prompt, answer(record, key), key) for key in keys))


def _asked(record: Mapping[str, Any]) -> tuple[Message, ...]:
    key = next(word for word in PROMPT_WORDS if word in record)
    return ({"role": "user", "content": instruction(record)},) if key == "instruction" else half(record, key, "user")
