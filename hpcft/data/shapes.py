"""Which shape a record has, told by its keys, and the row it becomes."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from hpcft.catalog import CHOSEN_AND_REJECTED, FORMATS, KINDS_OF_ROWS, OBJECTIVES, Format
from hpcft.data.rows import Row
from hpcft.data.values import Unusable
from hpcft.errors import near, refuse

MEDIA = ("images", "videos", "audios", "image", "video", "audio")
WITHOUT_TEMPLATE = ("text", "labelled_text")  # shapes that are no chats

Converter = Callable[[Mapping[str, Any]], Row]

# (what a record is, what the run needs) → what a person can do about it.
INSTEAD = {
    ("chat", "pair"): "write the bad answer beside the good one, as rejected_response beside messages",
    ("chat", "rated"): "give every record a label, true or false",
    ("pair", "chat"): "to train on the good answers alone, write each as messages without its rejected one",
    ("pair", "rated"): "write each answer as a record of its own, with the label true or false",
    ("rated", "chat"): "to train on the good answers alone, keep the records labelled true and take the label out",
    ("rated", "pair"): "a pair is two answers to one prompt, written in one record",
    ("chat", "labelled"): "give every record a `label`, the name or the number of its class",
    ("pair", "labelled"): "write each text as a record of its own, with its label",
    ("rated", "labelled"): "name the class of every record under `label`",
}


class Shaped:
    """The records of one file as rows. All must have the shape of the first: a mixed file is two files.

    rows: the kind of row that the run needs. shape: the name of the file's shape, empty before the first record.
    unread: how many records had each key that was not looked at.
    """

    def __init__(self, shown: str, rows: str = "chat") -> None:
        self.shown = shown
        self.rows = rows
        self.shape = ""
        self.first = 0
        self.unread: Counter[str] = Counter()

    def row(self, line: int, record: Any) -> Row:
        """The row of the record at ``line``. Raises Refusal naming file and line."""
        where = f"{self.shown}:{line}"
        if not isinstance(record, Mapping):
            raise refuse("a record must be an object with keys", where=where, value=repr(record))
        shape = self._shape(record)
        if not shape:
            raise unknown_shape(record, where, self.rows)
        if not self.shape:
            self.shape, self.first = shape, line
        if shape != self.shape:
            raise self._mixed(shape, record, where)
        if FORMATS[shape].rows != self.rows:
            raise unlike(shape, self.rows, record, where)
        looked = _Looked(record)
        try:
            row = _converter(shape)(looked)
        except Unusable as error:
            value = json.dumps(record, ensure_ascii=False, default=str)
            raise refuse(f"{error} (shape {shape})", where=where, value=value, hint=error.hint) from error
        if len(looked.at) < len(record):
            unread = [key for key in record if key not in looked.at]
            self.unread.update(unread)
            if key := next((key for key in unread if _shown(key, record[key], row)), None):
                raise refuse(
                    f"the record has `{key}`, and this release trains on text only",
                    where=where,
                    value=str(record[key]),
                    hint="take such records out; where the words do without, the key and its place in the words",
                )
        return row

    def _shape(self, record: Mapping[str, Any]) -> str:
        """The record's shape. Tables have a column for everything: of another kind, null is as good as absent."""
        shape = shape_of(frozenset(record), self.rows)
        if shape and FORMATS[shape].rows != self.rows:
            shape = shape_of(frozenset(key for key, value in record.items() if value is not None), self.rows) or shape
        return shape

    def _mixed(self, shape: str, record: Mapping[str, Any], where: str) -> Exception:
        return refuse(
            f"this record has the shape {shape}, but the file's first record (line {self.first}) is {self.shape}",
            where=where,
            value=", ".join(map(str, record)),
            hint="put records of each shape into a file of their own and list both files",
        )


@cache
def shape_of(keys: frozenset[str], rows: str = "chat") -> str:
    """The name of the first format that these keys satisfy, or an empty string. rows: the kind that the run needs."""
    labelled = [row for row in FORMATS.values() if row.rows == "labelled"]
    others = [row for row in FORMATS.values() if row.rows != "labelled"]
    order = [*labelled, *others] if rows == "labelled" else others
    return next((row.name for row in order if any(needed <= keys for needed in row.keys)), "")


def unknown_shape(record: Mapping[str, Any], where: str, rows: str) -> Exception:
    """The refusal of a record that no format knows, with the nearest one of the kind that the run needs."""
    keys = [str(key) for key in record]
    formats = {name: row for name, row in FORMATS.items() if row.rows == rows}
    name, needed, meant = _nearest(keys, formats)
    hint = f"nearest is {name}, which needs {', '.join(sorted(needed))}" if name else ""
    hint += "".join(f"; is `{key}` meant to be `{word}`?" for key, word in meant.items())
    return refuse(
        "no known shape of record has these keys", where=where, value=", ".join(keys), choices=formats, hint=hint
    )


def unlike(shape: str, needed: str, record: Mapping[str, Any], where: str) -> Exception:
    """The refusal of a record that is not of the kind that the run needs."""
    kind = FORMATS[shape].rows
    tasks = [row.name for row in OBJECTIVES.values() if row.rows == kind]
    hint = f"records like this are for task {' or '.join(tasks)}; " if tasks else ""
    return refuse(
        f"this record {_lacks(kind, needed, record)} (shape {shape}); the run needs {KINDS_OF_ROWS[needed]}",
        where=where,
        value=", ".join(map(str, record)),
        choices=[row.name for row in FORMATS.values() if row.rows == needed],
        hint=hint + INSTEAD[kind, needed],
    )


def _lacks(kind: str, needed: str, record: Mapping[str, Any]) -> str:
    alone = next((word for words in CHOSEN_AND_REJECTED for word in words if word in record), None)
    if needed == "pair" and kind == "chat":
        return f"has `{alone}` but not the other answer of a pair" if alone else "has no rejected answer"
    return "has no label" if needed in ("rated", "labelled") else f"is {KINDS_OF_ROWS[kind]}"


def _nearest(keys: list[str], formats: Mapping[str, Format]) -> tuple[str, frozenset[str], dict[str, str]]:
    """The format that needs the fewest changes: its name, the keys it needs, and which key was meant for which."""
    best: tuple[str, frozenset[str], dict[str, str]] = ("", frozenset(), {})
    score = 0.0
    for name, row in formats.items():
        for needed in row.keys:
            missing = needed - set(keys)
            meant = {key: word for key in keys if key not in needed and (word := near(key.lower(), missing))}
            found = (len(needed) - len(missing) + 0.9 * len(set(meant.values()))) / len(needed)
            if found > score:
                best, score = (name, needed, meant), found
    return best


def _shown(key: str, value: Any, row: Row) -> bool:
    """Whether pictures or sounds under ``key`` are part of ``row``.

    A single one may be a column like any other, unless its place is in the words: they would be learned without it.
    """
    counted = isinstance(value, int | float)  # how many there are
    if key not in MEDIA or counted or not _holds_something(value):
        return False
    texts = [row.text or "", *(turn["content"] for turn in (*row.messages, *row.rejected))]
    return key.endswith("s") or any(f"<{key}>" in text for text in texts)


def _holds_something(value: Any) -> bool:
    """Whether there is a picture or a sound in ``value``: not in nulls, empty texts, and lists and objects of such."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_something, value))
    return bool(value)


@cache
def _converter(shape: str) -> Converter:
    converter: Converter = importlib.import_module(FORMATS[shape].module).row
    return converter


class _Looked(Mapping[str, Any]):
    """A record that notes which of its keys were read; asking whether a key is there is not reading it."""

    __slots__ = ("at", "record")

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.at: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.record[key]
        self.at.add(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.record else default

    def __contains__(self, key: object) -> bool:
        return key in self.record

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)
