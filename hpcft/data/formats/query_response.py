"""``query`` and ``response``: ms-swift's records, under any of the names its users give the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.catalog import QUERY_WORDS, RESPONSE_WORDS
from hpcft.data.rows import Row
from hpcft.data.turns import dialogue, words


def halves(record: Mapping[str, Any]) -> tuple[str, str]:
    """The keys that hold the question and the answer: the first of each list that the record has."""
    return next(k for k in QUERY_WORDS if k in record), next(k for k in RESPONSE_WORDS if k in record)


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    query, response = halves(record)
    return dialogue(record, words(record, query), words(record, response))
