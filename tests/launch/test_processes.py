"""The torch side started from a project's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


CALL = """
import signal, sys
from hpcft.launch import processes
from tests.plans import plan
signal.signal(signal.SIGINT, signal.default_int_handler)
processes.run_module("slow", plan())
"""
SLOW = """
import pathlib, signal, sys, time
def ended(number, _):
    time.sleep(1)  # two in a quarter of a second are one to Python
    pathlib.Path("heard").touch()
    time.sleep({seconds})
    pathlib.Path("given back").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, ended)
pathlib.Path("began").touch()
time.sleep(120)
"""


def typed(folder: Path, seconds: float, *moments: str) -> tuple[int, bool]:
    """Ctrl-C typed at these moments while a process runs that needs ``seconds`` to end: code, and did it give back?"""
    (folder / "slow.py").write_text(SLOW.format(seconds=seconds))
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", CALL]
    with subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.DEVNULL, start_new_session=True) as call:
        for moment in moments:
            end = time.monotonic() + 60
            while not (folder / moment).exists():
                assert time.monotonic() < end, f"it never came so far: {moment}"
                time.sleep(0.02)
            os.killpg(call.pid, signal.SIGINT)
        return call.wait(60), (folder / "given back").exists()


def test_an_interrupted_process_gives_back_what_it_holds_before_the_command_ends(tmp_path: Path) -> None:
    assert typed(tmp_path, 0.5, "began") == (-signal.SIGINT, True)


def test_a_second_interrupt_ends_a_process_that_takes_its_time(tmp_path: Path) -> None:
    assert typed(tmp_path, 50, "began", "heard") == (-signal.SIGINT, False)
