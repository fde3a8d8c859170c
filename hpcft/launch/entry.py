"""How the batch shell's helpers end: a refusal as words on stderr and exit code 2, never a traceback for it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hpcft.errors import Refusal


def run(main: Callable[[], int]) -> int:
    """The exit code of ``main``; a Refusal is printed, every problem of it, and is 2."""
    try:
        return main()
    except Refusal as refusal:
        say(str(refusal))
        return refusal.exit_code


def say(text: str) -> None:
    """One line for people, in the batch log; stdout is kept for what the script reads."""
    print(f"hpcft: {text}", file=sys.stderr, flush=True)
