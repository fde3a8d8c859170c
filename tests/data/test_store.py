"""One writer at a time, a dead one's lock taken over."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

from hpcft.data.store import one_writer
from hpcft.plan.plan import DataPlan, data_key
from tests.plans import plan

DATA: DataPlan = plan().data


def lock_file(store: Path, host: str, pid: int) -> Path:
    lock = store / "locks" / f"{data_key(DATA)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"host": host, "pid": pid}))
    return lock


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    lock_file(tmp_path, socket.gethostname(), dead)
    with one_writer(tmp_path, DATA, lambda _: None):
        pass


def test_the_lock_of_another_host_is_taken_over_when_nobody_touched_it_for_long(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, "elsewhere", 1)
    os.utime(lock, (time.time() - 3600,) * 2)
    with one_writer(tmp_path, DATA, lambda _: None) as keep:
        keep()
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    assert not lock.exists()


def test_a_live_writer_is_waited_for_and_named(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, "elsewhere", 4711)
    said: list[str] = []
    threading.Timer(0.5, lock.unlink).start()
    start = time.monotonic()
    with one_writer(tmp_path, DATA, said.append):
        assert time.monotonic() - start >= 0.4
    assert "4711" in said[0]
