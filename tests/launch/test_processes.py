"""The torch side started from a project's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.launch.processes import run_module, safe
from tests.launch.conftest import ROOT
from tests.plans import plan


def test_a_file_of_the_project_is_not_taken_for_a_module_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("inspect", "tokenize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    assert run_module("hpcft.data.prepare", plan(), "--help") == 0


def test_a_checkout_that_is_the_current_folder_and_not_installed_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-S", "-m", "hpcft.launch.processes"]
    monkeypatch.chdir(ROOT)
    assert subprocess.run(command, env=safe({}), stderr=subprocess.DEVNULL).returncode == 0
    assert safe({"PYTHONPATH": "/a"})["PYTHONPATH"] == f"/a:{ROOT}"
    monkeypatch.chdir(tmp_path)
    assert "PYTHONPATH" not in safe({})
