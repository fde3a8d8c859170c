"""Where compiled programs are kept: they are code that ranks will run, so the folders must be this user's alone."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def keep_to_ourselves(environ: MutableMapping[str, str]) -> None:
    """Make the folders that ``environ`` names; one that another user has made or may write is not used, and it is said.

    Its name, with the job's number on a node's shared disk, can be guessed before the job starts.
    """
    for name in VARIABLES:
        if name in environ and not _is_ours(Path(environ[name])):
            fresh = tempfile.mkdtemp(prefix="hpcft-")
            print(f"hpcft: {name}: {environ[name]} is not this user's alone; {fresh} instead", file=sys.stderr)
            environ[name] = fresh


def _is_ours(folder: Path) -> bool:
    """Made if need be; ours and written by nobody else, in a folder where nobody else can put another in its place."""
    try:
        before = os.umask(0o077)  # of the folders above it, too
        try:
            folder.mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(before)
        own, above = folder.lstat(), folder.parent.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(own.st_mode) and own.st_uid == os.geteuid() and not own.st_mode & OTHERS_WRITE
    stays = above.st_uid in (os.geteuid(), 0) and (not above.st_mode & OTHERS_WRITE or above.st_mode & stat.S_ISVTX)
    return private and bool(stays)
