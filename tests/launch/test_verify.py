"""The verification as a job: short, once, under a name of its own; and which form it takes where."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch import verify, watch
from tests.plans import layout, plan

TWO = {"layout": layout(1, 2)}


def test_the_job_is_short_comes_back_never_and_writes_nobody_a_letter() -> None:
    resources = {"time_minutes": 600, "signal_lead": 300, "extra": ("--mail-type=END", "--comment=x")}
    r = verify.own_plan(plan(**TWO, resources=resources)).resources
    assert (r.job_name, r.time_minutes, r.signal_lead, r.requeue) == ("verify-tiny", 15, 60, False)
    assert r.extra == ("--comment=x",)


def test_one_rank_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(Refusal, match="nproc_per_node 2"):
        verify.own_plan(plan())


@pytest.mark.parametrize(
    ("launcher", "line"), [("srun", "-m hpcft.train.verify"), ("torchrun", "-m hpcft.launch.ranks --verify")]
)
def test_the_script_is_sound_and_starts_the_comparison_and_no_training(
    launcher: str, line: str, tmp_path: Path
) -> None:
    text = verify.script(verify.own_plan(plan(**TWO, resources={"launcher": launcher})))
    assert line in text
    assert "hpcft.train.main" not in text
    (tmp_path / "job").write_text(text)
    subprocess.run(["bash", "-n", "job"], cwd=tmp_path, check=True)


def test_where_there_is_no_slurm_a_slurm_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refusal, match="--cluster local"):
        verify.where(plan(**TWO))
    assert verify.where(plan(**TWO, resources={"scheduler": "none"})) is verify.verify_here
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert verify.where(plan(**TWO)) is verify.verify_in_allocation


@pytest.mark.parametrize(
    ("verdicts", "stays"), [(["ok", "absent"], False), (["ok", "differs"], True), (["not run"], True), (None, True)]
)
def test_the_folder_goes_where_all_is_well_and_stays_where_somebody_will_look(
    verdicts: Any, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with verify.folder(plan(**TWO)) as paths:
        assert paths.root.parent == tmp_path / "runs"
        paths.plan.write_text(plan(**TWO).to_json())
        assert watch.runs(tmp_path / "runs") == []
        if verdicts:
            paths.verified.write_text(json.dumps({"rows": [{"verdict": verdict} for verdict in verdicts]}))
    assert paths.root.exists() is stays


def test_interrupted_it_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), verify.folder(plan(**TWO)):
        raise KeyboardInterrupt
    assert list((tmp_path / "runs").iterdir()) == []
