"""``hpcft submit -f`` tells a script how the run ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from hpcft.cli import submit
from hpcft.launch.transport import Submitted
from hpcft.run import lease
from hpcft.run.folder import keep_plan
from hpcft.run.ledger import JOB_VARIABLE, Ledger
from hpcft.run.paths import RunPaths
from tests.plans import plan


@pytest.mark.parametrize(("ending", "code"), [("finished", 0), ("failed", 1), ("cancelled", 1)])
def test_a_followed_run_that_does_not_finish_is_exit_code_one(
    ending: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("{}")
    paths = RunPaths(tmp_path / "runs" / "tiny")

    def handed_over(*_: object) -> Submitted:
        paths.root.mkdir(parents=True)
        keep_plan(plan().to_json(), paths)
        ledger = Ledger(paths, "batch", {JOB_VARIABLE: lease.local_job()})
        ledger.write("attempt_began", restart=0)
        if ending == "finished":
            ledger.write("finished", step=4)
        ledger.write("attempt_ended", decision="done" if ending == "finished" else "stop", ending=ending, why="so")
        return Submitted("1", paths.root, "local")

    monkeypatch.setattr(submit, "_prepared", lambda planned, _: planned.plan)
    monkeypatch.setattr(submit, "hand_over", handed_over)
    words = ["--model", ".", "--from_scratch", "true", "--dataset", "a.jsonl", "--cluster", "local", "-f"]
    done = CliRunner().invoke(submit.command, words)
    assert done.exit_code == code, done.output
    assert "run tiny is" in done.output
