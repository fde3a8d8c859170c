"""``prompt`` and ``completion``: TRL's records, each half a text or a list of turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import half, tools, untrained, with_system


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row; turns of the prompt are never trained. Raises Unusable."""
    prompt = untrained(half(record, "prompt", "user"))
    return with_system(record, Row(prompt + half(record, "completion", "assistant"), tools(record)))
