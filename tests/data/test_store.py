"""One writer at a time, a dead one's lock taken over."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from hpcft.data.store import new_content, one_writer
from hpcft.plan.plan import DataPlan, data_key
from tests.plans import plan

DATA: DataPlan = plan().data


def lock_file(store: Path, host: str, pid: int) -> Path:
    lock = store / "locks" / f"{data_key(DATA)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"host": host, "pid": pid}))
    return lock


def dead_process() -> int:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    return dead


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    lock_file(tmp_path, socket.gethostname(), dead_process())
    with one_writer(tmp_path, data_key(DATA), lambda _: None):
        pass


def test_the_lock_of_another_host_is_taken_over_when_nobody_touched_it_for_long(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, "elsewhere", 1)
    os.utime(lock, (time.time() - 3600,) * 2)
    with one_writer(tmp_path, data_key(DATA), lambda _: None) as keep:
        keep()
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    assert not lock.exists()


def test_a_live_writer_is_waited_for_and_named(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, "elsewhere", 4711)
    said: list[str] = []
    threading.Timer(0.5, lock.unlink).start()
    start = time.monotonic()
    with one_writer(tmp_path, data_key(DATA), said.append):
        assert time.monotonic() - start >= 0.4
    assert "4711" in said[0]


@pytest.mark.parametrize(
    ("writer", "age", "stays"),
    [
        (f"{socket.gethostname()}-{os.getppid()}", 10**6, True),
        (f"{socket.gethostname()}-{os.getpid()}", 0, False),  # of a dead process that had our number
        ("a-node.of.a-cluster-1", 3600, True),
        ("a-node.of.a-cluster-1", 10**6, False),
    ],
    ids=["alive", "our number", "silent for an hour", "silent for days"],
)
def test_what_a_dead_writer_left_is_removed_and_what_a_live_one_writes_is_not(
    writer: str, age: float, stays: bool, tmp_path: Path
) -> None:
    other = tmp_path / f".0123abcd.{writer}"
    other.mkdir()
    (other / "train.tokens.bin").write_bytes(b"half")
    for path in (other / "train.tokens.bin", other):
        os.utime(path, (time.time() - age,) * 2)
    with new_content(tmp_path, "0123abcd") as folder:
        assert (other / "train.tokens.bin").exists() == stays
        assert folder.is_dir()
    assert (tmp_path / "0123abcd").is_dir()


def test_a_folder_that_a_dead_process_of_this_host_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".0123abcd.{socket.gethostname()}-{dead_process()}"
    left.mkdir()
    with new_content(tmp_path, "0123abcd"):
        assert not left.exists()
