"""The torch side started from the login side, as a process: a tokenizer costs two seconds and brings torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcft.errors import Refusal
from hpcft.launch.hub import exported_home
from hpcft.launch.inputs import unwritable_store
from hpcft.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or site-packages


def run_prepare(named: Plan, pinned: Plan, store: Path, *words: str, aside: bool = False) -> int:
    """Prepare the data of ``pinned``, so that who asks for it by the hubs' bare names finds it too.

    Those are scripts that ``hpcft render`` wrote, which asks no hub, and ``hpcft plan``. ``named``: the plan before
    its revisions were pinned. Raises Refusal where the store may not be written and does not have it already.
    """
    problem = unwritable_store(store)
    if problem and not is_prepared(pinned, store):
        raise Refusal(problem)
    if problem or named.data == pinned.data:  # what may only be read remembers no other name
        return run_data("prepare", pinned, store, *words, aside=aside)
    with _plan_file(named) as file:
        return run_data("prepare", pinned, store, "--also", file, *words, aside=aside)


def is_prepared(plan: Plan, store: Path) -> bool:
    """Whether the data of ``plan`` is in ``store`` as its files are now."""
    with _plan_file(plan) as file:
        return run_module("hpcft.data.prepare", plan, "--plan", file, "--store", str(store), "--look", aside=True) == 0


def run_data(verb: str, plan: Plan, store: Path, *words: str, aside: bool = False) -> int:
    """Run ``python -m hpcft.data.<verb>`` on ``plan`` and return its exit code.

    What it prints goes where ours goes; aside: all of it to stderr, because stdout has another reader.
    """
    with _plan_file(plan) as file:
        return run_module(f"hpcft.data.{verb}", plan, "--plan", file, "--store", str(store), *words, aside=aside)


@contextlib.contextmanager
def _plan_file(plan: Plan) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="hpcft-plan-", encoding="utf-8") as file:
        file.write(plan.to_json())
        file.flush()
        yield file.name


def run_module(module: str, plan: Plan, *words: str, aside: bool = False) -> int:
    """Run ``python -m module words…`` with this interpreter and return its exit code.

    The process finds this very hpcft, also where it is used from a checkout that is not installed, and looks for hub
    files in the cache that the job will read.
    """
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = safe(exported_home(plan, os.environ) | {"PYTHONPATH": path})
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr if aside else None) as process:
        return _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code. Ctrl-C reaches both: this one waits for what the other still has to give back, until the next."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        raise


def safe(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for ``python -m``: from Python 3.11 on a project's own inspect.py is not taken for Python's."""
    return {**findable(environ), "PYTHONSAFEPATH": "1"}


def findable(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` in which hpcft is found also where it is the current folder, a checkout that is not installed."""
    path = environ.get("PYTHONPATH", "")
    if Path.cwd() != ROOT or str(ROOT) in path.split(os.pathsep):
        return dict(environ)
    return {**environ, "PYTHONPATH": os.pathsep.join(part for part in (path, str(ROOT)) if part)}
