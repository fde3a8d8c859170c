"""The work area of a prepare: what became of each portion, kept until the content is published.

In the store's folder ``work`` each content has one of its own, with files such as scan-0-000017.npz, read-1-000017.npz.

A result appears by one rename and is read with its checksums, so one that a crash tore is done again. The folder has
the content's name, which is a hash of every option and of every file: no other data can find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.data.store import common
from hpcft.errors import Refusal

Arrays = dict[str, Any]
Result = tuple[Arrays, dict[str, Any]]
FACTS = "facts"
FORGOTTEN = 14 * 86400.0  # seconds after which the work on a content that nobody goes on with is removed
TRIES = 100  # to make a folder in one that others take away where they find it empty


class Killed(Refusal):
    """A worker was killed: no fault of the data, so what is finished is kept."""


class Work:
    """The results of one content's portions, by name."""

    def __init__(self, store: Path, content: str) -> None:
        self.store, self.all = store, store / "work"
        self.folder = self.all / content
        if self.folder.is_dir() and not os.access(self.folder, os.W_OK):  # another user's, in a store of many
            self.folder = self.all / f"{content}-{os.getuid()}"

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the block, what is finished stays for the next time; but what was refused is removed.

        For mended data, or another option, is another content.
        """
        self._begin()
        try:
            yield
        except Killed:
            raise
        except Refusal:
            self.end()
            raise

    def _begin(self) -> None:
        """Make the folder; remove what another writer was writing when it died, and what nobody came back to."""
        self._make()
        for torn in self.folder.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - torn.stat().st_mtime > 60:  # a live writer takes no minute for a result
                    torn.unlink()
        for other in self.all.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > FORGOTTEN and other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)

    def _make(self) -> None:
        """Another content's ``end`` takes the folder of all away where it is empty, between these two steps too."""
        for left in reversed(range(TRIES)):
            common(self.store, self.all.name)
            try:
                self.folder.mkdir(exist_ok=True)
            except FileNotFoundError:
                if not left:  # nobody takes it away: it is a link, say, to what is no more
                    raise
            else:
                return

    def has(self, name: str) -> bool:
        """Whether there is a result of that name; whether it is whole, ``load`` says."""
        return self._path(name).is_file()

    def save(self, name: str, result: Result) -> None:
        """Publish a result in one piece."""
        arrays, facts = result
        path = self._path(name)
        aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
        with aside.open("wb") as file:
            packed: Arrays = {**arrays, FACTS: np.frombuffer(json.dumps(facts).encode(), np.uint8)}
            np.savez(file, **packed)
        os.replace(aside, path)

    def load(self, name: str) -> Result | None:
        """A result, its checksums compared; None where there is none or it is damaged, and then it is removed."""
        path = self._path(name)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            return arrays, json.loads(arrays.pop(FACTS).tobytes())
        except FileNotFoundError:
            return None
        except Exception:  # a damaged archive raises anything from BadZipFile to SyntaxError
            path.unlink(missing_ok=True)
            return None

    def end(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another content's work is there
            self.all.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
