"""The store of prepared shards: names of its files, the address of a content, who may write, how it is published.

Standard library only, so that a login node and a rank can ask "is it there?" in no time. A content folder appears
by one rename and its shards never change (a picture of them may come later); the index of requests is a hint that any
writer may renew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.alive import born, gone
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan, data_key

FORMAT = 5  # raised whenever the same input would give other bytes
SCHEMA = 3  # of the manifest, of a portion and of what is counted of it; that of another release is made anew
ABSENT = -1
SHARED = 0o666  # less the umask
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
STALE_AFTER = 600.0  # seconds without a touch after which another host's lock is taken over
LEFT_AFTER = 86400.0  # the same of its temporary folder: one removed too soon costs a live writer all that it wrote


@dataclass(frozen=True)
class Input:
    """A file that shaped the shards. kind: train:0, validation:1 … (the source's number), tokenizer or template.

    size is ABSENT for a file that was not there but would have counted.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    kind: str
    pinned: bool = False

    @property
    def changed(self) -> bool:
        """Whether the file is there and is not as it was; a file that has gone away has not changed."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return not self.pinned and (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns)


@dataclass(frozen=True)
class Answer:
    """Prepared shards that fit a request: their folder, their manifest, the files they were made of.

    renewed: files had another date than was remembered, so they were hashed to find it.
    """

    folder: Path
    manifest: dict[str, Any]
    inputs: tuple[Input, ...]
    renewed: bool = False

    @property
    def content(self) -> str:
        return self.folder.name

    @property
    def names(self) -> list[str]:
        """The data files' paths, in the order of the manifest's ``files``."""
        return [entry.path for entry in self.inputs if entry.kind.startswith(("train:", "validation:"))]


def find(store: Path, data: DataPlan) -> Answer | None:
    """The shards of this request if they are there and its files are as they were; None otherwise."""
    request = _read(request_file(store, data))
    if request is None:
        return None
    inputs = tuple(Input(**entry) for entry in request["inputs"])
    content = str(request["content"])
    renewed = any(entry.changed for entry in inputs)
    if renewed:  # by date: by content it may still be the same, or another known one
        inputs = tuple(_renewed(entry) for entry in inputs)
        content = address(data, inputs)
    manifest = _read(store / content / "manifest.json")
    return Answer(store / content, manifest, inputs, renewed) if manifest and manifest["schema"] == SCHEMA else None


def address(data: DataPlan, inputs: Sequence[Input]) -> str:
    """The name of the content: a hash of every option and every file's bytes, but of no file's name or date."""
    options = {**asdict(data), "workers": None, "tokenizer": None, "tokenizer_source": None, "tokenizer_revision": None}
    options["chat_template"] = None if any(entry.kind == "template" for entry in inputs) else data.chat_template
    for split in ("train", "validation"):
        options[split] = [(source.rows, source.weight) for source in getattr(data, split)]
    files = [(entry.kind, Path(entry.path).name if entry.kind == "tokenizer" else "", entry.sha256) for entry in inputs]
    text = json.dumps({"format": FORMAT, "schema": SCHEMA, "options": options, "files": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def request_file(store: Path, data: DataPlan) -> Path:
    return store / "requests" / f"{data_key(data)}.json"


def remember(store: Path, data: DataPlan, content: str, inputs: Sequence[Input]) -> None:
    """Write which content answers this request."""
    path = request_file(store, data)
    common(store, path.parent.name)
    write_json(path, {"content": content, "inputs": [asdict(entry) for entry in inputs]})


def write_json(path: Path, value: Any) -> None:
    """Readable by whom the umask lets: the store is shared."""
    disk.replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", SHARED)


def common(store: Path, name: str) -> Path:
    """A folder of the store in which everybody writes who writes into the store."""
    folder = store / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        if (mode := _mode(store)) & OTHERS_WRITE:
            folder.chmod(mode)
    return folder


@contextlib.contextmanager
def readable(store: Path) -> Iterator[None]:
    """A umask by which all may read what is made in a store into which others may write too.

    The scripts of jobs ask that what they make be their owner's alone, which stays so in any other store.
    """
    before = os.umask(0o077)
    mode = _mode(store)
    os.umask((~mode & 0o077) | OTHERS_WRITE if mode & OTHERS_WRITE else before)
    try:
        yield
    finally:
        os.umask(before)


def refuse_closed(store: Path) -> None:
    """Raises Refusal where this account may not write what it would prepare: before the work, not after it."""
    for folder in (store, store / "requests", store / "work"):
        if folder.exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise closed(folder)


def closed(path: object) -> Refusal:
    return refuse(
        "the store of prepared data: this account may not write here",
        where=str(path),
        hint="its owner can open it and its folders (chmod g+rwxs); or name another as store in the profile",
    )


def _mode(folder: Path) -> int:
    try:
        return stat.S_IMODE(folder.stat().st_mode)
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def new_content(store: Path, content: str) -> Iterator[Path]:
    """A temporary folder that becomes ``<store>/<content>`` by one rename when the block ends well, else vanishes.

    What a killed writer left is removed first; its name begins with a dot and holds no manifest a reader would take.
    """
    for other in store.glob(f".{content}.*"):
        if _left(other):
            shutil.rmtree(other, ignore_errors=True)
    folder = store / f".{content}.{socket.gethostname()}-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            disk.sync(path)
        with contextlib.suppress(OSError):  # another writer was first: its bytes are the same
            os.rename(folder, store / content)
        disk.sync(store)
        if not (store / content).is_dir():
            raise OSError(f"{folder} could not be renamed to {store / content}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_writer(store: Path, name: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the lock of that name, waiting for a live holder; yields a function that keeps it fresh.

    A request's name is its key, a content's its address: two requests may ask for the same content.

    The lock saves work, it does not guard the shards: two writers would publish the same bytes under one name. So a
    takeover that goes wrong in some rare order of events costs minutes and nothing else.
    """
    lock = common(store, "locks") / f"{name}.lock"
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())})
    try:
        _wait(lock, mine, say)
    except PermissionError:
        say(f"no lock can be taken here, so another prepare of the same data would do the work too ({lock})")
        yield lambda: None
        return
    try:
        yield lambda: _touch(lock)
    finally:
        if (holder := _read(lock)) is not None and holder == json.loads(mine):
            lock.unlink(missing_ok=True)


def _wait(lock: Path, mine: str, say: Callable[[str], None]) -> None:
    """Until the lock is ours. Raises PermissionError where this account can neither take it nor take it away."""
    told = 0.0
    while not _created(lock, mine):
        holder = _read(lock)
        if _stale(lock, holder):
            lock.unlink(missing_ok=True)
        elif time.monotonic() - told > 15:
            told = time.monotonic()
            say(f"waiting for another prepare of the same data: {holder or 'unknown holder'} ({lock})")
        else:
            time.sleep(0.3)


def _touch(lock: Path) -> None:
    """Show that its holder lives. One that another took over meanwhile may be gone, or that other's alone to touch."""
    with contextlib.suppress(OSError):
        os.utime(lock)


def _created(lock: Path, text: str) -> bool:
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:  # one that says nothing would be waited for
        lock.unlink(missing_ok=True)
        raise
    return True


def _stale(lock: Path, holder: dict[str, Any] | None) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # given back just now; by the time that it were taken away it may be another's
        return False
    if holder is None:  # between creation and writing, or torn by a crash
        return age > 10
    if holder.get("host") != socket.gethostname():
        return age > STALE_AFTER
    return gone(int(holder["pid"]), holder.get("born", ""))  # which earlier releases did not write


def _left(folder: Path) -> bool:
    """Whether nobody writes a temporary folder any more: its process has ended, or another host's is long silent."""
    host, _, pid = folder.name.split(".", 2)[2].rpartition("-")
    if host == socket.gethostname():
        return int(pid) == os.getpid() or gone(int(pid), "")
    try:
        last = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # it goes away while it is looked at
        return False
    return time.time() - last > LEFT_AFTER


def _renewed(entry: Input) -> Input:
    if not entry.changed:
        return entry
    try:
        now = os.stat(entry.path)
        return Input(entry.path, now.st_size, now.st_mtime_ns, disk.sha256(Path(entry.path)), entry.kind, entry.pinned)
    except FileNotFoundError:  # replaced by being removed first; gone, it has not changed
        return entry


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(disk.read(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
