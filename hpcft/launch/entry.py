"""How the batch shell's helpers end: a refusal as words on stderr and exit code 2, never a traceback for it.

A full disk is said in the same way: the batch script takes any other code for a Python that cannot run hpcft. What may
be wrong on this node alone, a file system that is not mounted here, can have a code of its own.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from contextlib import suppress

from hpcft.errors import Refusal, storage

EXIT_OUT_OF_REACH = 4
# What another node may not suffer from; a full disk, a quota are everywhere.
OF_THE_NODE = {errno.ESTALE, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


def run(main: Callable[[], int], out_of_reach: int | None = None) -> int:
    """The exit code of ``main``; a Refusal is printed, every problem of it, and is 2, as is what a disk makes.

    out_of_reach: the code where files cannot be reached that may be in order elsewhere.
    """
    try:
        return main()
    except Refusal as refusal:
        return _refused(refusal, refusal.__cause__, out_of_reach)
    except OSError as error:
        if (words := storage(error)) is None:
            raise
        return _refused(words, error, out_of_reach)


def _refused(refusal: Refusal, cause: BaseException | None, out_of_reach: int | None) -> int:
    say(str(refusal))
    if out_of_reach is not None and isinstance(cause, OSError) and cause.errno in OF_THE_NODE:
        return out_of_reach
    return refusal.exit_code


def say(text: str) -> None:
    """One line for people, in the batch log; stdout is kept for what the script reads."""
    with suppress(OSError):  # the log may lie on the disk that is full
        print(f"hpcft: {text}", file=sys.stderr, flush=True)
