"""Data files cut into units: what one worker takes at a time, and what is not done again after a crash.

Where a unit begins is a function of the file's bytes alone, so a unit is the same for any number of workers and for
a prepare that goes on where another was killed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hpcft import disk
from hpcft.data.files import Records, is_lines, kind_of, records, stretch
from hpcft.data.shapes import Shaped
from hpcft.data.sources import DataFile
from hpcft.errors import Refusal, refuse

LARGEST, SMALLEST, MANY = 4 * 2**20, 64 * 2**10, 64  # bytes of a unit; units that a file of no great size is cut into
ROWS = 1024  # records of a unit where records can only be found one after another


@dataclass(frozen=True)
class Unit:
    """Bytes ``start`` … ``end`` of a file of lines, whose first line is ``line``; elsewhere records by number."""

    number: int
    start: int = 0
    end: int = 0
    line: int = 1


@dataclass(frozen=True)
class Cut:
    """A file as it was when it was read. units: of a file of lines; None: ``ROWS`` records each, however many."""

    file: DataFile
    size: int
    mtime_ns: int
    sha256: str
    units: tuple[Unit, ...] | None

    def still(self) -> None:
        """Raises Refusal where the file is another one now: its units would be another content's."""
        now = os.stat(self.file.path)
        if not self.file.pinned and (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise changed()


@dataclass(frozen=True)
class Piece:
    """One unit of one file with all that is needed to make rows of it. records: given where they were read already."""

    cut: Cut
    unit: Unit
    rows: str
    shape: str
    first: int
    records: list[tuple[int, Any]] | None = field(default=None, repr=False)

    def read(self, shaped: Shaped) -> Iterator[tuple[int, Any]]:
        """(line, row) of every record. Raises Refusal, with file and line, at a fault."""
        shaped.shape, shaped.first = self.shape, self.first
        for line, record in self.records if self.records is not None else self._records():
            yield line, shaped.row(line, record)

    def _records(self) -> Records:
        file, unit = self.cut.file, self.unit
        if self.cut.units is not None:
            return stretch(file.path, file.shown, unit.start, unit.end, unit.line)
        return islice(records(file.path, file.shown), unit.number * ROWS, (unit.number + 1) * ROWS)


def changed() -> Refusal:
    """The refusal of a file that another program writes."""
    return refuse("a file of the data changed while it was being prepared", hint="type the same command again")


def cut(file: DataFile) -> Cut:
    """Hash ``file`` and find its units. Raises Refusal where it cannot be read."""
    kind_of(file.path, file.shown)
    before = file.path.stat()
    if not is_lines(file.path, file.shown):
        return Cut(file, before.st_size, before.st_mtime_ns, disk.sha256(file.path), None)
    sha256, units = _lines(file, min(LARGEST, max(SMALLEST, before.st_size // MANY)))
    return Cut(file, before.st_size, before.st_mtime_ns, sha256, units)


def _lines(file: DataFile, size: int) -> tuple[str, tuple[Unit, ...]]:
    """The hash of a file of lines and its units of about ``size`` bytes, each up to the end of a line."""
    digest, units = hashlib.sha256(), list[Unit]()
    start, line = 0, 1
    with file.path.open("rb") as stream:
        while block := stream.read(size):
            block += stream.readline()
            digest.update(block)
            units.append(Unit(len(units), start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return digest.hexdigest(), tuple(units)


def pieces(cut: Cut, rows: str, shape: str, first: int) -> Iterator[Piece]:
    """The units of a file, in order; of a file without lines with their records."""
    if cut.units is not None:
        yield from (Piece(cut, unit, rows, shape, first) for unit in cut.units)
        return
    stream, number = records(cut.file.path, cut.file.shown), 0
    while some := list(islice(stream, ROWS)):
        yield Piece(cut, Unit(number), rows, shape, first, some)
        number += 1
