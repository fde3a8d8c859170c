"""metrics.jsonl and TensorBoard: what a run says about itself, with no service needed.

A line per logging interval, a line per evaluation, flushed at once. A resumed attempt first writes a marker; readers
drop what an attempt before it wrote beyond that step, or writes after it (on a node that Slurm had given up), so that
no step is ever seen twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hpcft.run.paths import RunPaths

RESUMED = "resumed_at"


class Metrics:
    """Rank 0's pen; on the other ranks (``paths`` None) nothing is written."""

    def __init__(self, paths: RunPaths | None, step: int, attempt: int) -> None:
        self._stream = _open(paths.metrics) if paths else None
        # Opened with the first line of a step: its imports would keep all ranks from their first one.
        self._open_board = partial(_board, paths.tensorboard, step) if paths else None
        self._board: Any = None
        self._attempt, self._told = attempt, False
        self.write({RESUMED: step})

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, on disk for other processes to see; numbers that are not finite become null."""
        if self._stream is None:
            return
        clean = {key: _finite(value) for key, value in {**line, "attempt": self._attempt}.items()}
        with self._going_on():
            self._stream.write(json.dumps(clean) + "\n")
            self._stream.flush()
        if "step" in line:
            with self._going_on():
                self._draw(line)

    def _draw(self, line: Mapping[str, Any]) -> None:
        if self._open_board is not None:
            opened, self._open_board = self._open_board, None
            self._board = opened()
        if self._board is not None:
            for key, value in line.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(_tag(key), value, line["step"])

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A disk that a save beside the training has filled for the moment must not end the run here.

        The stream keeps some kilobytes of what it could not write, until it can.
        """
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                with suppress(OSError):
                    print(f"WARNING: metrics cannot be written, the run goes on: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        for sink in (self._stream, self._board):
            if sink is not None:
                with self._going_on():
                    sink.close()
        self._stream = self._board = self._open_board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl in the order of steps, each step as its last attempt saw it; markers left out."""
    lines: list[dict[str, Any]] = []
    current = 0
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if not isinstance(line, dict):
            continue  # a piece of one, where two attempts wrote at the same moment
        attempt = line.get("attempt", current)
        if RESUMED in line:
            current = attempt
            lines = [earlier for earlier in lines if earlier["step"] <= line[RESUMED]]
        elif "step" in line and attempt >= current:
            lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(key: str) -> str:
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _open(path: Path) -> Any:
    """Append, private; a torn last line is ended first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return os.fdopen(file, "a", encoding="utf-8")


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; points of an earlier attempt beyond ``step`` are hidden. None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: metrics go to metrics.jsonl only", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)
