"""``instruction``, ``input``, ``output``: Alpaca's records, and Dolly's with ``context`` and ``response``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import dialogue, instruction, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row: the instruction, its input on the next line, and the output. Raises Unusable."""
    return dialogue(record, instruction(record), words(record, "output" if "output" in record else "response"))
