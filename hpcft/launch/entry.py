"""How the batch shell's helpers end: a refusal as words on stderr and exit code 2, never a traceback for it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths


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


def read_plan(paths: RunPaths) -> Plan:
    """The plan that the run folder holds. Raises Refusal where there is none or it cannot be read."""
    try:
        text = paths.plan.read_text(encoding="utf-8")
    except OSError as error:
        raise refuse(f"the run has no plan: {error.strerror}", where=str(paths.plan)) from error
    return Plan.from_json(text, where=str(paths.plan))
