"""A prompt under any of its names, and a ``chosen`` and a ``rejected`` answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import CHOSEN_AND_REJECTED, QUERY_WORDS
from hpcft.data.answers import after, answer, pair
from hpcft.data.rows import Row
from hpcft.data.turns import asked, history


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    prompt = (*history(record), *asked(record, QUERY_WORDS))
    keys = next(keys for keys in CHOSEN_AND_REJECTED if set(keys) <= set(record))
    return pair(record, *(after(prompt, answer(record, key), key) for key in keys))
