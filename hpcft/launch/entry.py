"""How the batch shell's helpers end: a refusal as words on stderr and exit code 2, never a traceback for it.

A full disk is said in the same way: the batch script takes any other code for a Python that cannot run hpcft.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from hpcft.errors import Refusal, storage


def run(main: Callable[[], int]) -> int:
    """The exit code of ``main``; a Refusal is printed, every problem of it, and is 2, as is what a disk makes."""
    try:
        return main()
    except Refusal as refusal:
        return _refused(refusal)
    except OSError as error:
        if (words := storage(error)) is None:
            raise
        return _refused(words)


def _refused(refusal: Refusal) -> int:
    say(str(refusal))
    return refusal.exit_code


def say(text: str) -> None:
    """One line for people, in the batch log; stdout is kept for what the script reads."""
    with suppress(OSError):  # the log may lie on the disk that is full
        print(f"hpcft: {text}", file=sys.stderr, flush=True)
