"""The values of a record: texts, lists and the JSON texts of them that tables have; and what it is to be unusable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Unusable(ValueError):
    """A record that cannot become a row: the sentence, and a hint. Whoever read the record adds file and line."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def text(value: Any, key: str) -> str:
    """``value``, of ``key``, as text; null is the empty text. Raises Unusable where it is not text."""
    if type(value) is str and readable(value):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Unusable(f"`{key}` is {kind_of(value)}, not text", hint="write it as text, in quotes")
    if not readable(value):
        raise Unusable(
            f"`{key}` holds half of a UTF-16 pair, which no tokenizer can read", hint="mend the \\ud… escape"
        )
    return value


def readable(text: str) -> bool:
    """Whether a text has no half of a UTF-16 pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def listing(value: Any, key: str) -> list[Any]:
    """``value`` as a list; null and the empty text are empty, a text is read as JSON. Raises Unusable."""
    if value is None:
        return []
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unusable(f"`{key}` is a text that is not JSON: {error}") from error
    if value in (None, "") or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list | tuple):
        raise Unusable(f"`{key}` is {kind_of(value)}, not a list")
    return list(value)


def objects(value: Any, key: str) -> list[Any]:
    """``value`` as ``listing`` has it; of its elements those that are the JSON text of an object are read too."""
    return [unpacked(item, key) if isinstance(item, str) else item for item in listing(value, key)]


def unpacked(value: str, key: str) -> Any:
    """The object that the text ``value`` holds; a text that does not begin as one, as it is. Raises Unusable."""
    if value.lstrip()[:1] != "{":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"`{key}` is a text that is not JSON: {error}") from error


def glimpsed(record: Mapping[str, Any], key: str) -> Any:
    """The value under ``key``, of which it is yet to be seen whether it is read: it is not noted as read."""
    return getattr(record, "record", record).get(key)


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
