"""Nulls that a table put into schemas and calls of tools, where the record that was written into it had nothing.

A column of Parquet has one type: each call gets the arguments of all functions, each schema the properties of all.
"""

from __future__ import annotations

from typing import Any

FILLED = ("tools", "tool_calls", "function_call")


def may_be_filled(schema: Any) -> bool:
    """Whether a table of this Arrow schema has anything of the kind."""
    return any(word in str(schema) for word in FILLED)


def without(value: Any, inside: bool = False) -> Any:
    """``value`` without the fields that are null in anything under the keys FILLED; inside: it stands under one."""
    if isinstance(value, dict):
        return {
            key: without(item, inside or key in FILLED) for key, item in value.items() if not (inside and item is None)
        }
    return [without(item, inside) for item in value] if isinstance(value, list) else value
