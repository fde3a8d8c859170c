"""Reading prepared shards: numpy and memory maps only, so that every rank opens them in milliseconds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data import store as stores
from hpcft.data.kinds import Kind
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan, data_key

# The files of a split: name → element type on disk. Little-endian everywhere, so shards travel between machines.
COLUMNS: dict[str, str] = {
    "tokens": "<i4",  # all documents, one after another
    "trained": "|u1",  # 1 where the token carries loss
    "documents": "<i8",  # first token of each document, and the end
    "counts": "<i4",  # trained tokens of each document
    "origins": "<i8",  # [documents, 2]: number of the input file, line in it
    "kinds": "|u1",  # what each document is: kinds.Kind
    # by how much the chosen answer is better, on both documents of a pair, 0 where nobody says; or a class's number
    "margins": "<f4",
    "members": "<i8",  # documents of all windows, one after another
    "windows": "<i8",  # first member of each window, and the end
}


def file_name(split: str, column: str) -> str:
    """The file of one column of a split, inside a content folder."""
    return f"{split}.{column}.bin"


@dataclass(frozen=True)
class Window:
    """tokens: int32 [n]; trained: bool [n], False on every document's first token; documents: lengths that sum to n.

    kinds: of each document, a ``Kind``; the one after a chosen one is its rejected one. margins: of each document; of
    a labelled one the number of its class.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    documents: list[int]
    kinds: list[int]
    margins: list[float]


class Windows:
    """The windows of one split, in their stored order. Raises Refusal where a file is missing or has another size."""

    def __init__(self, folder: Path, split: str, facts: dict[str, Any]) -> None:
        self._columns = {name: _mapped(folder / file_name(split, name), kind, facts) for name, kind in COLUMNS.items()}
        self._members, self._starts = self._columns["members"], self._columns["windows"]
        self._documents = self._columns["documents"]
        self.folder, self.split, self.facts = folder, split, facts

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as a name: it opens the memory maps itself instead of receiving their bytes."""
        return Windows, (self.folder, self.split, self.facts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Window]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Window:
        """The window ``index``, read from the memory map; raises IndexError outside the split."""
        return self._joined(self.documents(index))

    def record(self, first: int) -> Window:
        """The record that begins with document ``first``, as a window of its own: a pair is two documents."""
        return self._joined(self.record_documents(first))

    def record_documents(self, first: int) -> list[int]:
        """The numbers of the documents of the record that begins with ``first``."""
        return [first, first + 1] if self._columns["kinds"][first] == Kind.CHOSEN else [first]

    def _joined(self, documents: list[int]) -> Window:
        pieces = [slice(self._documents[d], self._documents[d + 1]) for d in documents]
        tokens = np.concatenate([self._columns["tokens"][piece] for piece in pieces])
        trained = np.concatenate([self._columns["trained"][piece] for piece in pieces])
        lengths = [int(piece.stop - piece.start) for piece in pieces]
        kinds, margins = (self._columns[name][documents].tolist() for name in ("kinds", "margins"))
        return Window(tokens, trained.astype(np.bool_), lengths, kinds, margins)

    def documents(self, index: int) -> list[int]:
        """The numbers of the documents in window ``index``."""
        index = range(len(self))[index]
        return [int(document) for document in self._members[self._starts[index] : self._starts[index + 1]]]

    def trained_tokens(self, index: int) -> int:
        """How many tokens of window ``index`` carry loss, without reading them."""
        return int(self._columns["counts"][self.documents(index)].sum())

    def count(self, index: int, kinds: Collection[int]) -> int:
        """How many documents of window ``index`` are of one of ``kinds``, without reading their tokens."""
        return sum(kind in kinds for kind in self._columns["kinds"][self.documents(index)].tolist())

    def margins(self) -> NDArray[np.float32]:
        """Of every document of the windows, repeats included."""
        margins: NDArray[np.float32] = self._columns["margins"][self._members]
        return margins

    def firsts(self) -> NDArray[np.int64]:
        """The number of each record's first document; one that is repeated stands here once."""
        return np.flatnonzero(self._columns["kinds"] != Kind.REJECTED)

    def records(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and trained tokens of every record of the windows; one that is repeated counts each time."""
        starts = np.flatnonzero(self._columns["kinds"][self._members] != Kind.REJECTED)
        if not len(starts):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        tokens, trained = np.diff(self._documents), self._columns["counts"].astype(np.int64)
        return np.add.reduceat(tokens[self._members], starts), np.add.reduceat(trained[self._members], starts)

    def origin(self, document: int) -> tuple[int, int]:
        """(number of the input file, line in it) of a document."""
        source, line = self._columns["origins"][2 * document : 2 * document + 2]
        return int(source), int(line)


@dataclass(frozen=True)
class Prepared:
    """The shards of one data request."""

    content: str
    train: Windows
    validation: Windows | None
    manifest: dict[str, Any]
    inputs: tuple[stores.Input, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of labelled rows, by number."""
        return tuple(self.manifest["classes"]["names"])


def open_prepared(store: Path, data: DataPlan) -> Prepared:
    """The shards of ``data`` in ``store``. Raises Refusal, with the command to type, where they are absent or stale."""
    answer = stores.find(store, data)
    if answer is None:
        raise not_prepared(store, data)
    splits = {name: Windows(answer.folder, name, facts) for name, facts in answer.manifest["splits"].items()}
    return Prepared(answer.content, splits["train"], splits.get("validation"), answer.manifest, answer.inputs)


def not_prepared(store: Path, data: DataPlan) -> Refusal:
    """The refusal of a request that has no shards."""
    known = stores.request_file(store, data).is_file()
    return refuse(
        "the data of this run has changed since it was prepared" if known else "the data of this run is not prepared",
        where=str(store),
        value=f"request {data_key(data)}",
        hint="on the login node: hpcft prepare RUN.yaml",
    )


def _mapped(path: Path, kind: str, facts: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(kind)
    size = path.stat().st_size if path.is_file() else -1
    if size != facts["files"][path.name]:
        raise refuse(
            "a file of the prepared data is damaged",
            where=str(path),
            value=f"{size} bytes, the manifest says {facts['files'][path.name]}" if size >= 0 else "missing",
            hint=f"remove the folder {path.parent} and type: hpcft prepare RUN.yaml",
        )
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
