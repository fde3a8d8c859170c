"""Writes the columns of one split: documents as they come, windows at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hpcft.data.encode import Document
from hpcft.data.packing import best_fit, one_each
from hpcft.data.shards import COLUMNS, file_name


class SplitWriter:
    """One split of a content folder. A document is stored once, however many windows hold it."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.tokens = (folder / file_name(split, "tokens")).open("wb")
        self.trained = (folder / file_name(split, "trained")).open("wb")
        self.lengths: list[int] = []
        self.counts: list[int] = []
        self.copies: list[int] = []
        self.origins: list[tuple[int, int]] = []

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tokens.close()
        self.trained.close()

    def add(self, document: Document, copies: int, origin: tuple[int, int]) -> None:
        """Append a document that ``copies`` windows will hold. origin: number of its input file, line in it."""
        self.tokens.write(document.tokens.astype(COLUMNS["tokens"]).tobytes())
        self.trained.write(document.trained.astype(COLUMNS["trained"]).tobytes())
        self.lengths.append(len(document.tokens))
        self.counts.append(int(document.trained.sum()))
        self.copies.append(copies)
        self.origins.append(origin)

    def finish(self, max_length: int, packing: bool) -> dict[str, Any]:
        """Write offsets and windows; the facts of this split for the manifest."""
        self.tokens.close()
        self.trained.close()
        lengths, copies = np.array(self.lengths, np.int64), np.array(self.copies, np.int64)
        documents = np.repeat(np.arange(len(lengths)), copies)
        windows = best_fit(lengths[documents], max_length) if packing else one_each(len(documents))
        self._write("documents", _offsets(self.lengths))
        self._write("counts", self.counts)
        self._write("origins", np.array(self.origins, np.int64).reshape(-1))
        self._write("windows", _offsets([len(window) for window in windows]))
        self._write("members", documents[np.array([member for window in windows for member in window], np.int64)])
        tokens = int((lengths * copies).sum())
        return {
            "windows": len(windows),
            "rows": len(documents),
            "tokens": tokens,
            "trained_tokens": int((np.array(self.counts, np.int64) * copies).sum()),
            "max_window": max((int(lengths[documents[window]].sum()) for window in windows), default=0),
            "max_length": max_length,
            "filled": round(tokens / (max_length * len(windows)), 4) if windows else 0.0,
            "files": {name: (self.folder / name).stat().st_size for name in self._names()},
        }

    def _names(self) -> list[str]:
        return [file_name(self.split, column) for column in COLUMNS]

    def _write(self, column: str, values: Any) -> None:
        (self.folder / file_name(self.split, column)).write_bytes(np.asarray(values).astype(COLUMNS[column]).tobytes())


def _offsets(lengths: Sequence[int]) -> Any:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
