"""``instruction``, ``input``, ``output``: Alpaca's records, and Dolly's with ``context`` and ``response``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import asked, dialogue, words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row: the instruction, its input on the next line, and the output. Raises Unusable."""
    response = "output" if "output" in record else "response"
    return dialogue(record, asked(record, ("instruction",)), words(record, response))
