"""Data files cut into portions: what one worker takes at a time, and what is not done again after a crash.

Where a portion begins is a function of the file's bytes alone, so it is the same for any number of workers and for a
prepare that goes on where another was killed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpcft import disk
from hpcft.data.files import is_lines, records, stretch
from hpcft.data.shapes import Shaped
from hpcft.data.sources import DataFile
from hpcft.errors import Refusal, refuse

T = TypeVar("T")
LARGEST, SMALLEST = 4 * 2**20, 64 * 2**10  # bytes of a portion
MANY = 64  # portions that a file of no great size is cut into
ROWS = 1024  # records of a portion, at most, where records can only be found one after another


@dataclass(frozen=True)
class Portion:
    """Bytes ``start`` … ``end`` of a file of lines, whose first line is ``line``; elsewhere records by number."""

    number: int
    start: int = 0
    end: int = 0
    line: int = 1


@dataclass(frozen=True)
class Cut:
    """A file as it was when it was read. portions: of a file of lines; None: as ``pieces`` hands its records out."""

    file: DataFile
    size: int
    mtime_ns: int
    sha256: str
    portions: tuple[Portion, ...] | None

    def still(self) -> None:
        """Raises Refusal where the file is another one now: its portions would be another content's."""
        now = os.stat(self.file.path)
        if not self.file.pinned and (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise changed()


@dataclass(frozen=True)
class Piece:
    """One portion of a file with all that is needed to make rows of it. records: given where they were read already."""

    cut: Cut
    portion: Portion
    rows: str
    shape: str
    first: int
    records: list[tuple[int, Any]] | None = field(default=None, repr=False)

    def read(self, shaped: Shaped) -> Iterator[tuple[int, Any]]:
        """(line, row) of every record. Raises Refusal, with file and line, at a fault."""
        shaped.shape, shaped.first = self.shape, self.first
        file, portion = self.cut.file, self.portion
        there: Iterable[tuple[int, Any]] | None = self.records
        if there is None:
            there = stretch(file.path, file.shown, portion.start, portion.end, portion.line)
        for line, record in there:
            yield line, shaped.row(line, record)


def changed() -> Refusal:
    """The refusal of a file that another program writes."""
    return refuse("a file of the data changed while it was being prepared", hint="type the same command again")


def cut(file: DataFile) -> Cut:
    """Hash ``file`` and find its portions. Raises Refusal where it cannot be read."""
    lines = is_lines(file.path, file.shown)
    before = file.path.stat()
    if not lines:
        return Cut(file, before.st_size, before.st_mtime_ns, disk.sha256(file.path), None)
    sha256, portions = _lines(file, min(LARGEST, max(SMALLEST, before.st_size // MANY)))
    return Cut(file, before.st_size, before.st_mtime_ns, sha256, portions)


def _lines(file: DataFile, size: int) -> tuple[str, tuple[Portion, ...]]:
    """The hash of a file of lines and its portions of about ``size`` bytes, each up to the end of a line."""
    digest, portions = hashlib.sha256(), list[Portion]()
    start, line = 0, 1
    with file.path.open("rb") as stream:
        while block := stream.read(size):
            block += stream.readline()
            digest.update(block)
            portions.append(Portion(len(portions), start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
    return digest.hexdigest(), tuple(portions)


def pieces(cut: Cut, rows: str, shape: str, first: int) -> Iterator[Piece]:
    """The portions of a file, in order; of a file without lines with their records."""
    if cut.portions is not None:
        yield from (Piece(cut, portion, rows, shape, first) for portion in cut.portions)
        return
    found = records(cut.file.path, cut.file.shown)
    for number, some in enumerate(heaps(found, lambda item: _characters(item[1]), ROWS, LARGEST)):
        yield Piece(cut, Portion(number), rows, shape, first, some)


def heaps(items: Iterable[T], size: Callable[[T], int], most: int, largest: int) -> Iterator[list[T]]:
    """``most`` items at a time or, where they are large, as many as come to ``largest``."""
    some, total = list[T](), 0
    for item in items:
        some.append(item)
        total += size(item)
        if len(some) == most or total >= largest:
            yield some
            some, total = [], 0
    if some:
        yield some


def _characters(value: Any) -> int:
    """Of all texts in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
