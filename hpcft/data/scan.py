"""The first pass over a data file: every record read and made a row once, so that faults show before any work."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hpcft.data.classes import MOST, Labels
from hpcft.data.files import records
from hpcft.data.mixing import Digests
from hpcft.data.pool import Desk, Workers
from hpcft.data.portions import Cut, Piece, pieces
from hpcft.data.rows import Category
from hpcft.data.shapes import Shaped
from hpcft.data.work import Result
from hpcft.errors import refuse

SMALL = 8 * 2**20  # bytes that this process reads faster than others start


@dataclass(frozen=True)
class Scan:
    """What a data file holds. counts: rows of each portion; unread: records that had a key nobody looked at.

    digests: uint64 [rows], one per row. groups: the same of what equal rows, or those of one prompt, have in common.
    first: the line of the first record, whose shape all have.
    """

    counts: tuple[int, ...]
    shape: str
    first: int
    digests: Digests
    groups: Digests
    unread: dict[str, int]
    labels: Labels  # each with the line where it stands first

    @property
    def rows(self) -> int:
        return len(self.digests)


@dataclass(frozen=True)
class ScanTask:
    """Read one portion. number: of the file among those scanned."""

    number: int
    piece: Piece

    @property
    def name(self) -> str:
        return f"scan-{self.number}-{self.piece.portion.number:06d}"

    def do(self, desk: Desk) -> Result:
        piece = self.piece
        shaped = Shaped(piece.cut.file.shown, piece.rows)
        digests, groups, labels = array("Q"), array("Q"), dict[Category, int]()
        for line, row in piece.read(shaped):
            if row.category is not None:
                labels.setdefault(row.category, line)
                check_labels(labels, piece.cut.file.shown)
            digests.append(row.digest)
            groups.append(digests[-1] if piece.rows == "chat" else row.group)
        found = {"digests": np.array(digests, np.uint64), "groups": np.array(groups, np.uint64)}
        return found, {"unread": list(shaped.unread.items()), "labels": list(labels.items())}


def scan(number: int, cut: Cut, rows: str, workers: Workers, tick: Callable[[int, bool], None]) -> Scan:
    """Read all of a file, which must hold ``rows`` of that kind. Raises Refusal, with file and line, at a fault."""
    shaped = Shaped(cut.file.shown, rows)
    for line, record in islice(records(cut.file.path, cut.file.shown), 1):
        shaped.row(line, record)
    digests, groups, unread, labels = [], [], Counter[str](), dict[Category, int]()
    tasks = (ScanTask(number, piece) for piece in pieces(cut, rows, shaped.shape, shaped.first))
    for _, (arrays, facts), made in workers.results(tasks, here=cut.size < SMALL):
        digests.append(arrays["digests"])
        groups.append(arrays["groups"])
        unread.update(dict(facts["unread"]))
        for label, line in facts["labels"]:
            labels.setdefault(label, line)
        check_labels(labels, cut.file.shown)
        tick(len(digests[-1]), made)
    counts = tuple(map(len, digests))
    whole = np.concatenate(digests), np.concatenate(groups)
    return Scan(counts, shaped.shape, shaped.first, *whole, dict(unread.most_common()), labels)


def check_labels(labels: Labels, shown: str) -> None:
    """Raises Refusal, with the line of the first label beyond them, where there are more than MOST."""
    if len(labels) > MOST:
        label, line = list(labels.items())[MOST]
        hint = "`label` is to name a class; is it a text here?"
        raise refuse(f"more than {MOST:,} labels", where=f"{shown}:{line}", value=label, hint=hint)
