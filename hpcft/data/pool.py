"""Encoders in worker processes: rows in, documents out, in the order of the rows whatever the number of workers."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcft.data import tokenizer as tokenizers
from hpcft.data.documents import Document
from hpcft.data.encode import Encoder
from hpcft.data.rows import Row
from hpcft.plan.plan import DataPlan

CHUNK = 128  # rows a worker takes at a time
AHEAD = 4  # chunks waiting per worker, so that memory stays flat however fast the files are read


@dataclass(frozen=True)
class Task:
    """A row, and whatever its asker wants back beside the document."""

    key: tuple[str, int, int, int]
    row: Row


class Encoders:
    """``data.workers`` processes that tokenise; one worker means this process. Used in a ``with`` block."""

    def __init__(self, data: DataPlan, folder: Path, tokenizer: Any) -> None:
        self.data, self.folder = data, folder
        self.here = Encoder(data, tokenizer) if data.workers <= 1 else None
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoders:
        if self.here is None:
            self.pool = ProcessPoolExecutor(self.data.workers, _processes(), _begin, (self.data, self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def documents(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Document | str]]:
        """Each task with its document, or with the sentence why it cannot be one; in the order of ``tasks``."""
        for chunk, documents in self._chunks(_chunked(tasks)):
            yield from zip(chunk, documents, strict=True)

    def _chunks(self, chunks: Iterator[list[Task]]) -> Iterator[tuple[list[Task], list[Document | str]]]:
        if self.here is not None:
            for chunk in chunks:
                yield chunk, self.here.documents([task.row for task in chunk])
            return
        assert self.pool is not None
        waiting: deque[tuple[list[Task], Future[list[Document | str]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self.pool.submit(_encode, [task.row for task in chunk])))
            if len(waiting) >= AHEAD * self.data.workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _chunked(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    tasks = iter(tasks)
    while chunk := list(itertools.islice(tasks, CHUNK)):
        yield chunk


def _processes() -> Any:
    """Workers are forked from a bare server that imported the slow part once, never from here, with its threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.auto.tokenization_auto"])
    return context


_encoder: Encoder


def _begin(data: DataPlan, folder: Path) -> None:
    global _encoder
    _encoder = Encoder(data, tokenizers.load(data, folder))


def _encode(rows: Sequence[Row]) -> list[Document | str]:
    return _encoder.documents(rows)
