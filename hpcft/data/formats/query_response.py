"""``query`` and ``response``: ms-swift's records, under any of the names its users give the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import QUERY_WORDS, RESPONSE_WORDS
from hpcft.data.rows import Row
from hpcft.data.turns import asked, dialogue, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    response = next(word for word in RESPONSE_WORDS if word in record)
    return dialogue(record, asked(record, QUERY_WORDS), words(record, response))
