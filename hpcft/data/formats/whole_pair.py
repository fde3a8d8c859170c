"""``chosen`` and ``rejected``, each a whole conversation; the turns they have in common are the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import CHOSEN_AND_REJECTED
from hpcft.data.answers import answer, pair
from hpcft.data.rows import Row
from hpcft.data.values import Unusable


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    keys = next(keys for keys in CHOSEN_AND_REJECTED if set(keys) <= set(record))
    both = [answer(record, key) for key in keys]
    for key, turns in zip(keys, both, strict=True):
        if turns[0]["role"] == "assistant":
            raise Unusable(
                f"there is no prompt: the record has none, and `{key}` begins with the assistant's words",
                hint=f"add `prompt`, or write {keys[0]} and {keys[1]} as lists of turns that begin with the user's",
            )
    return pair(record, *both)
