"""What is loaded where: a login node never waits for torch, a job's helpers need nothing but Python."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.cli.main import VERBS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "peft", "deepspeed", "datasets", "pydantic", "jinja2", "submitit", "numpy", "pyarrow"}

# The batch shell starts each of these on the batch host; the profile's Python may have nothing else that works there.
HELPERS = [
    "hpcft.launch.accept",
    "hpcft.launch.after",
    "hpcft.launch.begin",
    "hpcft.launch.preflight",
    "hpcft.launch.ranks",
    "hpcft.launch.local",
    "hpcft.plan.plan",
    "hpcft.plan.place",
    *(f"hpcft.run.{file.stem}" for file in sorted((ROOT / "hpcft/run").glob("[a-z]*.py"))),
    *(f"hpcft.slurm.{file.stem}" for file in sorted((ROOT / "hpcft/slurm").glob("[a-z]*.py"))),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def loaded(code: str) -> set[str]:
    """The top-level modules that ``code`` brings into a fresh interpreter."""
    begin, end = "import sys; before = set(sys.modules)", "print('\\n' + ' '.join(set(sys.modules) - before))"
    program = f"{begin}\n{code}\n{end}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def third_party(modules: set[str]) -> set[str]:
    return modules - set(sys.stdlib_module_names) - {"hpcft"}


def test_importing_hpcft_loads_nothing_at_all() -> None:
    assert loaded("import hpcft") <= {"hpcft"}


def test_the_jobs_helpers_load_only_the_standard_library() -> None:
    assert all(importlib.util.find_spec(module) for module in HELPERS)
    assert third_party(loaded(f"import {', '.join(HELPERS)}")) == set()


def run_help(*words: str) -> set[str]:
    code = f"""
import contextlib, io
from hpcft.cli.main import main
sys.argv = ["hpcft", {", ".join(repr(word) for word in words)}]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
    main()
assert "Usage" in said.getvalue(), said.getvalue()
"""
    return loaded(code)


def test_help_loads_click_and_nothing_else() -> None:
    assert third_party(run_help("--help")) == {"click"}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verbs_help_loads_a_heavy_module(verb: str) -> None:
    assert run_help(verb, "--help") & HEAVY == set()
