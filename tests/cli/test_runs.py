"""Runs by name and by folder: what is printed to be typed next finds the run from where it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpcft.run import lease
from hpcft.run.folder import keep_plan
from hpcft.run.ledger import JOB_VARIABLE, Ledger
from hpcft.run.paths import RunPaths
from tests.cli.test_commands import hpcft, refused
from tests.plans import plan


def stopped(root: Path) -> Path:
    """The folder of a run whose only attempt failed."""
    root.mkdir(parents=True)
    paths = RunPaths(root)
    keep_plan(plan(name=root.name).to_json(), paths)
    ledger = Ledger(paths, "batch", {JOB_VARIABLE: lease.local_job()})
    ledger.write("attempt_began", restart=0)
    ledger.write("attempt_ended", decision="stop", ending="failed", why="so")
    return root


@pytest.mark.parametrize(("folder", "spelt"), [("runs", "tiny"), ("out", "out/tiny"), ("my runs", "'my runs/tiny'")])
def test_the_next_command_finds_the_run_wherever_it_lies(folder: str, spelt: str, tmp_path: Path) -> None:
    stopped(tmp_path / folder / "tiny")
    said = hpcft(f"status {spelt}", tmp_path)
    assert said.returncode == 0, said.stderr
    assert f"hpcft logs {spelt} " in said.stderr
    assert re.search(rf"hpcft resume {spelt}$", said.stderr.strip())


def test_a_run_in_another_folder_is_offered_for_its_name(tmp_path: Path) -> None:
    stopped(tmp_path / "out" / "tiny")
    assert "did you mean out/tiny?" in refused("status tiny", tmp_path)
    assert "hpcft list OUTPUT_DIR" in hpcft("list", tmp_path).stderr
    assert hpcft("list out", tmp_path).stdout.startswith("tiny ")


@pytest.mark.parametrize(("scratch", "merge"), [(True, " --merge"), (False, "")])
def test_the_export_that_is_named_next_is_one_that_is_possible(scratch: bool, merge: str, tmp_path: Path) -> None:
    root = stopped(tmp_path / "runs" / "tiny")
    keep_plan(plan(name="tiny", model={"from_scratch": scratch}, tuner={"kind": "lora"}).to_json(), RunPaths(root))
    Ledger(RunPaths(root), "batch", {JOB_VARIABLE: lease.local_job()}).write("finished", step=4)
    assert hpcft("status tiny", tmp_path).stderr.strip() == f"next: hpcft export tiny{merge}"


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    assert "no such run" in refused(f"status {'x' * 300}", tmp_path)
