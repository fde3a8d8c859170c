"""Text that survives a crash and that no reader meets half written; the bytes of a file in one number.

Standard library only: a login node, the batch shell's helpers and the ranks write with it. Errors name the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o600
BLOCK = 4 * 2**20  # bytes read at a time while hashing
READ_AGAIN = (0.0, 0.1, 0.5)  # seconds before another look at a file that was taken away


def write(path: Path, text: str, mode: int = PRIVATE, durable: bool = True) -> None:
    """``text`` into ``path``; returns once the disk has it. A link at that place is not followed.

    durable False: after a power cut the file may be empty; thousands of notes are written in the time of a few.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with named(path), os.fdopen(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of an open file know nothing of its name: they get it here."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path: Path, text: str, mode: int = PRIVATE) -> None:
    """``text`` into ``path`` in one piece: a reader sees the old text or the new one, on every node."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        write(aside, text, mode)
        os.replace(aside, path)
    except OSError:  # what found no room must not take any, nor keep its folder from being removed
        with suppress(OSError):
            aside.unlink()
        raise


def read(path: Path) -> str:
    """The text of a file that another node may ``replace`` meanwhile.

    NFS takes the old text away from who has just opened it (ESTALE); who opens it again finds the new one.
    """
    for pause in READ_AGAIN:
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(pause)
    return path.read_text(encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
