"""Writes the columns of one split: documents as they come, windows at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.kinds import Kind
from hpcft.data.packing import best_fit, one_each
from hpcft.data.shards import COLUMNS, file_name

# What is kept in memory until all documents are known: a few dozen bytes a document. As ``tokenise.Columns`` has them.
SMALL = {
    "lengths": "i8", "counts": "i4", "kinds": "u1", "lines": "i8", "margins": "f4",
    "documents": "i8", "copies": "i8", "files": "i8",
}  # fmt: skip


class SplitWriter:
    """One split of a content folder. A document is stored once, however many windows hold it.

    The two documents of a pair are one row, so they stand side by side in one window.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.tokens = (folder / file_name(split, "tokens")).open("wb")
        self.trained = (folder / file_name(split, "trained")).open("wb")
        self.small: dict[str, list[Any]] = {name: [np.empty(0, kind)] for name, kind in SMALL.items()}

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tokens.close()
        self.trained.close()

    def add(self, columns: Mapping[str, Any], file: int) -> None:
        """Append the documents of one portion, as ``tokenise.Columns`` has them. file: number of its input file."""
        self.tokens.write(columns["tokens"].astype(COLUMNS["tokens"], copy=False).data)
        self.trained.write(columns["trained"].astype(COLUMNS["trained"], copy=False).data)
        for name in SMALL:
            self.small[name].append(columns[name] if name != "files" else np.full(len(columns["lines"]), file))

    def finish(self, max_length: int, packing: bool) -> dict[str, Any]:
        """Write offsets and windows; the facts of this split for the manifest."""
        self.tokens.close()
        self.trained.close()
        column = {name: np.concatenate(parts) for name, parts in self.small.items()}
        starts, rows = _offsets(column["lengths"]), _offsets(column["documents"])
        taken = np.repeat(np.arange(len(column["copies"])), column["copies"])
        sizes = (starts[rows[1:]] - starts[rows[:-1]])[taken]
        chosen = best_fit(sizes, max_length) if packing else one_each(len(taken))
        windows = _offsets([len(window) for window in chosen])  # first place of each window, and the end
        order = np.fromiter(chain.from_iterable(chosen), np.int64, len(taken))
        placed, filled = taken[order], _offsets(sizes[order])[windows]
        many = column["documents"][placed]
        ends = _offsets(many)
        members = np.repeat(rows[placed] - ends[:-1], many) + np.arange(ends[-1])
        self._write("documents", starts)
        self._write("counts", column["counts"])
        self._write("origins", np.stack([column["files"], column["lines"]], 1).reshape(-1))
        self._write("windows", ends[windows])
        self._write("members", members)
        self._write("kinds", column["kinds"])
        self._write("margins", column["margins"])
        kinds = Counter(column["kinds"][members].tolist())
        tokens = int(filled[-1])
        return {
            "windows": len(chosen),
            "rows": len(taken),
            "kinds": {kind.word: kinds[kind] for kind in Kind if kinds[kind]},
            "tokens": tokens,
            "trained_tokens": int(column["counts"].astype(np.int64)[members].sum()),
            "max_window": int(np.diff(filled).max(initial=0)),
            "max_length": max_length,
            "filled": round(tokens / (max_length * len(chosen)), 4) if len(chosen) else 0.0,
            "files": {name: (self.folder / name).stat().st_size for name in self._names()},
        }

    def _names(self) -> list[str]:
        return [file_name(self.split, column) for column in COLUMNS]

    def _write(self, column: str, values: Any) -> None:
        (self.folder / file_name(self.split, column)).write_bytes(np.asarray(values).astype(COLUMNS[column]).tobytes())


def _offsets(lengths: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
