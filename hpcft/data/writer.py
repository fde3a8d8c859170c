"""Writes the columns of one split: documents as they come, windows at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.documents import Document
from hpcft.data.kinds import Kind
from hpcft.data.packing import best_fit, one_each
from hpcft.data.shards import COLUMNS, file_name


class SplitWriter:
    """One split of a content folder. A document is stored once, however many windows hold it.

    The two documents of a pair are one row, so they stand side by side in one window.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.tokens = (folder / file_name(split, "tokens")).open("wb")
        self.trained = (folder / file_name(split, "trained")).open("wb")
        self.lengths: list[int] = []
        self.counts: list[int] = []
        self.kinds: list[int] = []
        self.margins: list[float] = []
        self.origins: list[tuple[int, int]] = []
        self.rows: list[int] = []  # documents of each row
        self.copies: list[int] = []  # windows that hold each row

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tokens.close()
        self.trained.close()

    def add(self, document: Document, copies: int, origin: tuple[int, int]) -> None:
        """Append what a row became; ``copies`` windows will hold it. origin: number of its input file, line in it."""
        self.rows.append(len(document.both))
        self.copies.append(copies)
        for part in document.both:
            self.tokens.write(part.tokens.astype(COLUMNS["tokens"]).tobytes())
            self.trained.write(part.trained.astype(COLUMNS["trained"]).tobytes())
            self.lengths.append(len(part.tokens))
            self.counts.append(int(part.trained.sum()))
            self.kinds.append(part.kind)
            self.margins.append(part.margin)
            self.origins.append(origin)

    def finish(self, max_length: int, packing: bool) -> dict[str, Any]:
        """Write offsets and windows; the facts of this split for the manifest."""
        self.tokens.close()
        self.trained.close()
        starts, rows = _offsets(self.lengths), _offsets(self.rows)
        taken = np.repeat(np.arange(len(self.rows)), self.copies)
        sizes = (starts[rows[1:]] - starts[rows[:-1]])[taken]
        chosen = best_fit(sizes, max_length) if packing else one_each(len(taken))
        windows = [[d for row in taken[window] for d in range(rows[row], rows[row + 1])] for window in chosen]
        members = np.array([document for window in windows for document in window], np.int64)
        self._write("documents", starts)
        self._write("counts", self.counts)
        self._write("origins", np.array(self.origins, np.int64).reshape(-1))
        self._write("windows", _offsets([len(window) for window in windows]))
        self._write("members", members)
        self._write("kinds", self.kinds)
        self._write("margins", self.margins)
        kinds, tokens = Counter(self.kinds[document] for document in members), int(sizes.sum())
        return {
            "windows": len(windows),
            "rows": len(taken),
            "kinds": {kind.word: kinds[kind] for kind in Kind if kinds[kind]},
            "tokens": tokens,
            "trained_tokens": int(np.array(self.counts, np.int64)[members].sum()),
            "max_window": max((int(sizes[window].sum()) for window in chosen), default=0),
            "max_length": max_length,
            "filled": round(tokens / (max_length * len(windows)), 4) if windows else 0.0,
            "files": {name: (self.folder / name).stat().st_size for name in self._names()},
        }

    def _names(self) -> list[str]:
        return [file_name(self.split, column) for column in COLUMNS]

    def _write(self, column: str, values: Any) -> None:
        (self.folder / file_name(self.split, column)).write_bytes(np.asarray(values).astype(COLUMNS[column]).tobytes())


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
