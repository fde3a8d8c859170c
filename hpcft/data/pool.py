"""Portions in worker processes: their results come in the order of the portions, whatever the number of workers."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from hpcft.data import tokenizer as tokenizers
from hpcft.data.encode import Encoder
from hpcft.data.portions import Piece
from hpcft.data.work import Killed, Result, Work
from hpcft.errors import Problem, Refusal
from hpcft.plan.plan import DataPlan

AHEAD = 3  # portions waiting per worker, so that memory stays flat however fast the files are read
LOOK_SECONDS = 5.0  # between looks whether there still are workers that a result could come from


@dataclass(frozen=True)
class Desk:
    """What a worker has at hand. encoder: made when a portion first asks for it."""

    data: DataPlan
    tokenizer: Path
    work: Work

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.data, tokenizers.load(self.data, self.tokenizer))


class Task(Protocol):
    """Something to do with one portion. name: under which the work area keeps the result."""

    @property
    def name(self) -> str: ...

    @property
    def piece(self) -> Piece: ...

    def do(self, desk: Desk) -> Result: ...


T = TypeVar("T", bound=Task)


class Workers:
    """``data.workers`` processes; one worker means this process. Used in a ``with`` block."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.pool: ProcessPoolExecutor | None = None
        self.found = self.portions = 0  # results that were there, of how many in all
        self.others = multiprocessing.active_children()  # processes that are none of ours

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is None:
            return
        if self.pool._broken:  # it ends the workers that it knew then, and waits for one that was just being started
            self._kill()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._kill()  # one that was being started when a signal came would be waited for at this process's end

    def _kill(self) -> None:
        for process in multiprocessing.active_children():
            if process not in self.others:
                process.kill()

    def results(self, tasks: Iterable[T], here: bool = False) -> Iterator[tuple[T, Result, bool]]:
        """Each task with its result and whether that was made now, in order. here: in this process.

        Raises the first Refusal in the order of the tasks, so that a person is told the same for any number of workers.
        """
        waiting: deque[tuple[T, Future[None] | None, bool]] = deque()
        later: Refusal | None = None
        tasks = iter(tasks)
        while True:
            try:
                task = next(tasks)
            except StopIteration:
                break
            except Refusal as refusal:  # what was read before it may be refused too, and comes first
                later = refusal
                break
            there = self.desk.work.has(task.name)
            waiting.append((task, None if there else self._begin(task, here), not there))
            self.found, self.portions = self.found + there, self.portions + 1
            while len(waiting) > (0 if here else AHEAD * self.desk.data.workers):
                yield self._ended(*waiting.popleft())
        while waiting:
            yield self._ended(*waiting.popleft())
        if later:
            raise later

    def _begin(self, task: T, here: bool) -> Future[None] | None:
        if here or self.desk.data.workers <= 1:
            perform(self.desk, task)
            return None
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.desk.data.workers, _processes(), _start, (self.desk,))
        try:
            return self.pool.submit(_perform, task)
        except (BrokenProcessPool, EOFError, ConnectionError) as error:  # a worker is gone, or who forks them
            raise _killed(self.desk.data.workers) from error
        except OSError as error:  # a worker that is killed while others are being started breaks off their start
            if not self.pool._broken:
                raise
            raise _killed(self.desk.data.workers) from error

    def _ended(self, task: T, future: Future[None] | None, made: bool) -> tuple[T, Result, bool]:
        if future is not None:
            try:
                self._wait_for(future)
                future.result()
            except BrokenProcessPool as error:
                raise _killed(self.desk.data.workers) from error
        if (result := self.desk.work.load(task.name)) is None:  # damaged
            perform(self.desk, task)
            result = self.desk.work.load(task.name)
        if result is None:
            raise OSError(f"a result in {self.desk.work.folder} cannot be read back: {task.name}")
        return task, result, made

    def _wait_for(self, future: Future[None]) -> None:
        """Until it is done. What was handed out in the moment in which the pool broke is done by nobody."""
        while not wait([future], LOOK_SECONDS).done:
            if self.pool is None or self.pool._broken:
                raise BrokenProcessPool


def perform(desk: Desk, task: Task) -> None:
    """Do a task and publish its result, unless its file is another one by now."""
    result = task.do(desk)
    task.piece.cut.still()
    desk.work.save(task.name, result)


def _killed(workers: int) -> Killed:
    return Killed(
        Problem(
            "a worker process was killed from outside, most likely for want of memory",
            value=f"{workers} workers",
            hint="type the same command again: what is finished is kept; fewer workers with --dataset_num_proc N",
        )
    )


def _processes() -> Any:
    """Workers are forked from a bare server that imported the slow part once, never from here, with its threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.auto.tokenization_auto"])
    return context


_desk: Desk


def _start(desk: Desk) -> None:
    global _desk
    _desk = desk
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the workers ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what the server imported is nobody's garbage
    gc.set_threshold(50_000, 20, 50)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


def _perform(task: Task) -> None:
    perform(_desk, task)
