"""One writer at a time, a dead one's lock taken over; a store of many users, and one of a single user."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcft import alive, disk
from hpcft.data import store, work
from hpcft.data.store import (
    SCHEMA,
    Input,
    common,
    find,
    new_content,
    one_writer,
    readable,
    refuse_closed,
    remember,
    write_json,
)
from hpcft.data.work import Work
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

    def ends(words: str) -> None:
        said.append(words)
        assert json.loads(lock.read_text())["pid"] == 4711
        threading.Timer(0.5, lock.unlink).start()

    with one_writer(tmp_path, data_key(DATA), ends):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert len(said) == 1
    assert "4711" in said[0]


def test_a_dead_writer_whose_number_another_process_has_by_now_is_not_waited_for(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, socket.gethostname(), os.getppid())
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "born": "1"}))
    said: list[str] = []
    given_up = threading.Timer(20, lambda: lock.unlink(missing_ok=True))
    given_up.start()
    with one_writer(tmp_path, data_key(DATA), said.append):
        given_up.cancel()
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert said == []


def test_a_live_writer_of_whom_the_system_shows_nothing_but_the_number_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_file(tmp_path, socket.gethostname(), os.getppid())
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "born": "1"}))
    monkeypatch.setattr(alive, "_facts", lambda pid: [])
    found: list[int] = []

    def told(_: str) -> None:
        found.append(json.loads(lock.read_text())["pid"])
        lock.unlink()

    with one_writer(tmp_path, data_key(DATA), told):
        assert found == [os.getppid()]


@pytest.mark.parametrize("taken", ["away", "by another account"])
def test_a_writer_that_was_silent_for_long_goes_on_whoever_has_the_lock_now(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = os.utime

    def touched(lock: Path) -> None:
        if taken == "away":
            lock.unlink()
            touch(lock)
        raise PermissionError(errno.EPERM, "Operation not permitted", str(lock))

    with one_writer(tmp_path, data_key(DATA), lambda _: None) as keep:
        monkeypatch.setattr(os, "utime", touched)
        keep()


def test_a_lock_given_back_while_it_is_looked_at_is_not_taken_from_who_has_it_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, read, others = lock_file(tmp_path, "elsewhere", 4711), Path.stat, list[Path]()

    def looked(path: Path, **words: bool) -> os.stat_result:
        if path == lock and not others:
            lock.unlink()
            try:
                return read(path, **words)
            finally:  # given back, and at once another's
                others.append(lock_file(tmp_path, "a third", 4712))
        return read(path, **words)

    monkeypatch.setattr(Path, "stat", looked)
    found: list[str] = []

    def told(_: str) -> None:
        found.append(json.loads(lock.read_text())["host"])
        lock.unlink()

    with one_writer(tmp_path, data_key(DATA), told):
        assert found == ["a third"]


def test_a_lock_that_a_full_disk_has_no_room_for_is_not_left_behind(tmp_path: Path) -> None:
    common(tmp_path, "locks")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), one_writer(tmp_path, data_key(DATA), lambda _: None):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "locks").iterdir()) == []


def test_work_begins_where_that_of_another_content_ends_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, times = common, list[Path]()

    def ended(store: Path, name: str) -> Path:
        folder = made(store, name)
        if not times:
            Work(store, "another").end()
        times.append(folder)
        return folder

    monkeypatch.setattr(work, "common", ended)
    with Work(tmp_path, "c").kept():
        assert (tmp_path / "work/c").is_dir()
    assert len(times) == 2


def test_work_whose_folder_cannot_be_made_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "work").symlink_to(tmp_path / "purged")
    with pytest.raises(FileNotFoundError), Work(tmp_path, "c").kept():
        pass


def test_a_request_that_another_node_replaces_at_this_moment_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes(tmp_path)
    read, lost = Path.read_text, list[Path]()

    def stale(path: Path, **words: str) -> str:
        if path.parent.name == "requests" and not lost:
            lost.append(path)
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, **words)

    monkeypatch.setattr(Path, "read_text", stale)
    assert find(tmp_path, DATA) is not None
    assert lost


def test_a_file_removed_while_it_is_hashed_anew_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    entry = Input(str(rows), 1, 1, "0", "train:0")

    def removed(path: Path) -> str:
        path.unlink()
        return path.read_text()

    monkeypatch.setattr(disk, "sha256", removed)
    assert store._renewed(entry) == entry


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


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's own; left as another account is."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_another(do: Callable[[], None]) -> str:
    """What ``do`` said as a user without rights of its own; "" where all went well."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            do()
            said = ""
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, encoding="utf-8") as pipe:
        return pipe.read()


def writes(store: Path, data: DataPlan = DATA) -> None:
    """What a prepare does in the store, under the umask of a job's script."""
    os.umask(0o077)
    with readable(store):
        refuse_closed(store)
        with one_writer(store, data_key(data), lambda _: None), new_content(store, "c") as folder:
            write_json(folder / "manifest.json", {"schema": SCHEMA})
            with Work(store, "c").kept():
                pass
        remember(store, data, "c", [])


def reads(store: Path) -> None:
    assert find(store, DATA) is not None


@pytest.mark.parametrize("mode", [0o1777, 0o2777])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_store_into_which_others_may_write_is_theirs_too(place: Path, mode: int) -> None:
    place.chmod(mode)
    umask = os.umask(0)
    try:
        writes(place)
    finally:
        os.umask(umask)
    other = plan(data={"seed": 5}).data
    assert as_another(lambda: writes(place, other)) == ""
    assert as_another(lambda: reads(place)) == ""
    assert (place / "c").stat().st_mode & 0o022 == 0, "what is prepared is not for others to change"


def test_any_other_store_is_its_owners_alone_when_the_umask_says_so(place: Path) -> None:
    umask = os.umask(0)
    try:
        writes(place)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o077 for path in place.rglob("*")} == {0}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_store_that_another_has_closed_is_refused_before_the_work_with_what_to_do(place: Path) -> None:
    place.chmod(0o1777)
    (place / "requests").mkdir(mode=0o700)
    assert "Refusal" in (said := as_another(lambda: writes(place)))
    assert f"{place}/requests" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_without_a_lock_that_this_account_can_take_the_data_is_prepared_all_the_same(place: Path) -> None:
    place.chmod(0o1777)
    (place / "locks").mkdir(mode=0o700)
    assert as_another(lambda: writes(place)) == ""
