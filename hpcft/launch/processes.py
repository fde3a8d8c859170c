"""The torch side started from the login side, as a process: importing a tokenizer costs two seconds and brings torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcft.plan.plan import Plan


def run_data(verb: str, plan: Plan, store: Path, *words: str) -> int:
    """Run ``python -m hpcft.data.<verb>`` on ``plan``; what it prints goes where ours goes. Returns its exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="hpcft-plan-", encoding="utf-8") as file:
        file.write(plan.to_json())
        file.flush()
        return run_module(f"hpcft.data.{verb}", "--plan", file.name, "--store", str(store), *words)


def run_module(module: str, *words: str) -> int:
    """Run ``python -m module words…`` with this interpreter and return its exit code.

    The process finds this very hpcft, also where it is used from a checkout that is not installed.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", module, *words], check=False, env=environment).returncode
