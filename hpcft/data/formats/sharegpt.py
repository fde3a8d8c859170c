"""``conversations``: turns with from and value, or ms-swift's list of {human, assistant} pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import shared_gpt, tools, with_system


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    return with_system(record, Row(shared_gpt(record), tools(record)))
