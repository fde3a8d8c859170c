"""The second pass over a portion: its chosen rows become documents, one column beside the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.audit import Audit
from hpcft.data.classes import Classes
from hpcft.data.documents import KEPT, Document
from hpcft.data.pool import Desk
from hpcft.data.portions import Piece, heaps
from hpcft.data.refused import found
from hpcft.data.rows import Row
from hpcft.data.shapes import Shaped
from hpcft.data.work import Arrays, Result

TOGETHER = 256  # rows that are encoded at a time
LARGEST = 8 * 2**20  # characters that are rendered for them, about: long conversations go fewer at a time

Chosen = tuple[str, int, int, Row]
"""(split, copies, line, row) of a row that is taken."""


@dataclass
class Columns:
    """The kept rows of one portion and one split, and the count of all."""

    audit: Audit = field(default_factory=Audit)
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    trained: list[NDArray[np.bool_]] = field(default_factory=list)
    documents: list[tuple[int, int, int, int, float]] = field(default_factory=list)  # of each: as ``arrays`` has them
    rows: list[tuple[int, int]] = field(default_factory=list)  # of each record: its documents, the windows that hold it

    def add(self, document: Document, copies: int, origin: tuple[int, int]) -> None:
        """Append what a row became; ``copies`` windows will hold it. origin: number of its input file, line in it."""
        self.audit.add(document, origin)
        if document.fate != KEPT:
            return
        for record in document.records:
            self._append(record, copies, origin)

    def _append(self, record: Document, copies: int, origin: tuple[int, int]) -> None:
        self.rows.append((len(record.both), copies))
        for part in record.both:
            self.tokens.append(part.tokens)
            self.trained.append(part.trained)
            trained = int(np.count_nonzero(part.trained))
            self.documents.append((len(part.tokens), trained, int(part.kind), origin[1], part.margin))

    def arrays(self) -> Arrays:
        """Columns of tokens (tokens, trained), of documents (lengths … margins) and of rows (documents, copies).

        row_lengths: of every row that was taken, kept or not.
        """
        lengths, counts, kinds, lines, margins = list(zip(*self.documents, strict=True)) or [()] * 5
        documents, copies = list(zip(*self.rows, strict=True)) or [()] * 2
        return {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "trained": np.concatenate([np.empty(0, np.bool_), *self.trained]),
            "lengths": np.array(lengths, np.int64),
            "counts": np.array(counts, np.int32),
            "kinds": np.array(kinds, np.uint8),
            "lines": np.array(lines, np.int64),
            "margins": np.array(margins, np.float32),
            "documents": np.array(documents, np.int64),
            "copies": np.array(copies, np.int64),
            "row_lengths": np.array(self.audit.lengths, np.int64),
        }


@dataclass(frozen=True)
class TokeniseTask:
    """Encode one portion. number: of the file among all of the request; copies: split → how often each row is taken."""

    number: int
    piece: Piece
    copies: Mapping[str, NDArray[np.int64]] = field(repr=False)
    classes: Classes = field(repr=False)

    @property
    def name(self) -> str:
        return f"read-{self.number}-{self.piece.portion.number:06d}"

    def do(self, desk: Desk) -> Result:
        """Rows that cannot be written with the chat template are left out, and told under ``refused``."""
        columns, refused = {split: Columns() for split in self.copies}, list[tuple[int, str]]()
        rows = self.piece.read(Shaped(self.piece.cut.file.shown, self.piece.rows))
        for some in together(self._chosen(rows)):
            documents = desk.encoder.documents([row for _, _, _, row in some])
            for (split, copies, line, _), document in zip(some, documents, strict=True):
                if isinstance(document, str):
                    refused.append((line, document))
                    continue
                self.classes.mark(document)
                columns[split].add(document, copies, (self.number, line))
        arrays = {f"{split}.{key}": a for split, column in columns.items() for key, a in column.arrays().items()}
        return arrays, {
            **{split: column.audit.counts() for split, column in columns.items()},
            "refused": found(refused),
        }

    def _chosen(self, rows: Iterator[tuple[int, Row]]) -> Iterator[Chosen]:
        """The rows that are taken; a row is in one split."""
        taken = [(split, copies.tolist()) for split, copies in self.copies.items()]
        for n, (line, row) in enumerate(rows):
            yield from ((split, copies[n], line, row) for split, copies in taken if copies[n])


def together(chosen: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    """What is encoded at a time: so many rows as keep a worker busy and its memory small."""
    return heaps(chosen, lambda item: rendered_size(item[3]), TOGETHER, LARGEST)


def rendered_size(row: Row) -> int:
    """About how many characters ``Masker.rendered`` holds of a row: up to each answer, all that stands before it."""
    if row.text is not None:
        return len(row.text)
    turns = row.messages + row.rejected
    return sum(len(turn["content"]) for turn in turns) * sum(turn["role"] == "assistant" for turn in turns)


def of_split(arrays: Arrays, split: str) -> dict[str, Any]:
    """The arrays of one split, by their bare names."""
    return {key.removeprefix(f"{split}."): array for key, array in arrays.items() if key.startswith(f"{split}.")}
