"""The first pass over a data file: every record read and made a row once, so that faults show before any work."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hpcft import disk
from hpcft.data.classes import MOST, Labels
from hpcft.data.files import kind_of, records
from hpcft.data.mixing import Digests
from hpcft.data.progress import shown
from hpcft.data.rows import Category, Row
from hpcft.data.shapes import Shaped
from hpcft.data.sources import DataFile
from hpcft.errors import refuse


@dataclass(frozen=True)
class Scan:
    """What a data file holds. unread: records that had a key nobody looked at.

    digests: uint64 [rows], one per row. groups: the same of what equal rows, or those of one prompt, have in common.
    """

    size: int
    mtime_ns: int
    sha256: str
    rows: int
    shape: str
    digests: Digests
    groups: Digests
    unread: dict[str, int]
    labels: Labels  # each with the line where it stands first


def scan(file: DataFile, rows: str) -> Scan:
    """Read all of ``file``, which must hold ``rows`` of that kind. Raises Refusal, with file and line, at a fault."""
    kind_of(file.path, file.shown)
    before = file.path.stat()
    shaped = Shaped(file.shown, rows)
    digests, groups, labels = array("Q"), array("Q"), dict[Category, int]()
    for line, row in shown(_rows(file, shaped), f"reading {file.shown}"):
        if row.category is not None and labels.setdefault(row.category, line) == line and len(labels) > MOST:
            hint = "`label` is to name a class; is it a text here?"
            raise refuse(f"more than {MOST:,} labels", where=f"{file.shown}:{line}", value=row.category, hint=hint)
        digests.append(row.digest)
        groups.append(digests[-1] if rows == "chat" else row.group)
    unread = dict(shaped.unread.most_common())
    return Scan(
        before.st_size,
        before.st_mtime_ns,
        disk.sha256(file.path),
        len(digests),
        shaped.shape,
        np.array(digests, np.uint64),
        np.array(groups, np.uint64),
        unread,
        labels,
    )


def rows_of(file: DataFile, rows: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of every record of a file that was scanned before."""
    return _rows(file, Shaped(file.shown, rows))


def _rows(file: DataFile, shaped: Shaped) -> Iterator[tuple[int, Row]]:
    for line, record in records(file.path, file.shown):
        yield line, shaped.row(line, record)
