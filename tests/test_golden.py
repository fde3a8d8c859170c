"""The committed scripts and reference pages are what the code makes of them today."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden import PREPARATIONS, ROOT, SCRIPTS, goldens

SCRIPT_FILES = [
    *(ROOT / "sbatch" / cluster / f"{run}.sbatch" for cluster, runs in SCRIPTS.items() for run in runs),
    *(ROOT / "sbatch" / cluster / f"{run}.prepare.sbatch" for cluster, runs in PREPARATIONS.items() for run in runs),
]


@pytest.mark.parametrize(("path", "text"), [pytest.param(p, t, id=str(p.relative_to(ROOT))) for p, t in goldens()])
def test_a_committed_file_is_what_is_rendered_now(path: Path, text: Callable[[], str]) -> None:
    assert path.read_text(encoding="utf-8") == text(), "read the difference, then: make golden"


def test_no_script_lies_in_sbatch_that_nothing_renders() -> None:
    assert sorted((ROOT / "sbatch").rglob("*.sbatch")) == sorted(SCRIPT_FILES)


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_bash_and_shellcheck_accept_every_script(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shellcheck := shutil.which("shellcheck"):
        result = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_script_holds_a_home_a_date_or_a_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert str(Path.home()) not in text.replace("/root-", "")
    assert str(ROOT) not in text
    assert "TOKEN=" not in text.upper()
