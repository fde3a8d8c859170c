"""``text``: raw text, trained from its second token to the end-of-text token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Row
from hpcft.data.turns import words


def row(record: Mapping[str, Any]) -> Row:
    """The canonical row. Raises Unusable."""
    return Row(text=words(record, "text"))
