"""``messages``: a list of turns with role and content, as OpenAI's files have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import conversation, tools, with_system


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    return with_system(record, Row(conversation(record["messages"], "messages"), tools(record)))
