"""Which shape a record has, told by its keys, and the row it becomes."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from hpcft.catalog import FORMATS
from hpcft.data.rows import Row, Unusable
from hpcft.errors import near, refuse

Converter = Callable[[Mapping[str, Any]], Row]


class Shaped:
    """The records of one file as rows. All must have the shape of the first: a mixed file is two files.

    shape: its name, empty before the first record. unread: how many records had each key that was not looked at.
    """

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.shape = ""
        self.first = 0
        self.unread: Counter[str] = Counter()

    def row(self, line: int, record: Any) -> Row:
        """The row of the record at ``line``. Raises Refusal naming file and line."""
        where = f"{self.shown}:{line}"
        if not isinstance(record, Mapping):
            raise refuse("a record must be an object with keys", where=where, value=repr(record))
        shape = shape_of(frozenset(record))
        if not shape:
            raise unknown_shape(record, where)
        if not self.shape:
            self.shape, self.first = shape, line
        if shape != self.shape:
            raise self._mixed(shape, record, where)
        looked = _Looked(record)
        try:
            row = _converter(shape)(looked)
        except Unusable as error:
            raise refuse(f"{error} (shape {shape})", where=where, hint=error.hint) from error
        self.unread.update(key for key in record if key not in looked.at)
        return row

    def _mixed(self, shape: str, record: Mapping[str, Any], where: str) -> Exception:
        return refuse(
            f"this record has the shape {shape}, but the file's first record (line {self.first}) is {self.shape}",
            where=where,
            value=", ".join(map(str, record)),
            hint="put records of each shape into a file of their own and list both files",
        )


@cache
def shape_of(keys: frozenset[str]) -> str:
    """The name of the first format that these keys satisfy, or an empty string."""
    return next((name for name, row in FORMATS.items() if any(needed <= keys for needed in row.keys)), "")


def unknown_shape(record: Mapping[str, Any], where: str) -> Exception:
    """The refusal of a record that no format knows, with the nearest one."""
    keys = [str(key) for key in record]
    name, needed, meant = _nearest(keys)
    hint = f"nearest is {name}, which needs {', '.join(sorted(needed))}" if name else ""
    hint += "".join(f"; is `{key}` meant to be `{word}`?" for key, word in meant.items())
    return refuse(
        "no known shape of record has these keys", where=where, value=", ".join(keys), choices=FORMATS, hint=hint
    )


def _nearest(keys: list[str]) -> tuple[str, frozenset[str], dict[str, str]]:
    """The format that needs the fewest changes: its name, the keys it needs, and which key was meant for which."""
    best: tuple[str, frozenset[str], dict[str, str]] = ("", frozenset(), {})
    score = 0.0
    for name, row in FORMATS.items():
        for needed in row.keys:
            missing = needed - set(keys)
            meant = {key: word for key in keys if key not in needed and (word := near(key.lower(), missing))}
            found = (len(needed) - len(missing) + 0.9 * len(set(meant.values()))) / len(needed)
            if found > score:
                best, score = (name, needed, meant), found
    return best


@cache
def _converter(shape: str) -> Converter:
    converter: Converter = importlib.import_module(FORMATS[shape].module).row
    return converter


class _Looked(Mapping[str, Any]):
    """A record that notes which of its keys were read; asking whether a key is there is not reading it."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.at: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.record[key]
        self.at.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self.record

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)
