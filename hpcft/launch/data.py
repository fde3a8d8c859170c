"""``hpcft.data`` as a process of its own: importing a tokenizer costs two seconds and brings torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcft.plan.plan import Plan


def run_data(module: str, plan: Plan, store: Path, *arguments: str) -> int:
    """Run ``python -m hpcft.data.<module>`` on ``plan``; its output goes where ours goes. Returns its exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="hpcft-plan-", encoding="utf-8") as file:
        file.write(plan.to_json())
        file.flush()
        command = [sys.executable, "-m", f"hpcft.data.{module}", "--plan", file.name, "--store", str(store)]
        # The process must find this hpcft also where it is run from a checkout that is not installed.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        return subprocess.run([*command, *arguments], check=False, env={**os.environ, "PYTHONPATH": path}).returncode
