"""``hpcft submit`` and ``hpcft resume`` as they are typed: what they look after before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.launch import watch
from hpcft.launch.accept import accept
from hpcft.launch.render import render
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.paths import RunPaths
from tests import tiny
from tests.launch.conftest import furnish
from tests.plans import plan

HERE = """\
name: here
scheduler: none
accelerator: cpu
gpus_per_node: 0
cores_per_node: 1
gpu_request: none
fabric: loopback
mem: null
time: 10
prepare: in_job
"""
RUN = "--model ./model --from_scratch true --torch_dtype float32 --dataset ./rows.jsonl --max_length 256"


def hpcft(line: str, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcft.cli.main", *line.split()]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=300
    )


def test_without_slurm_submit_prepares_what_the_profile_leaves_to_the_job(
    tmp_path: Path, standin: dict[str, str]
) -> None:
    rows = tiny.records(200)
    tiny.write_records(tmp_path / "rows.jsonl", rows)
    tiny.write_model(tmp_path / "model", [str(row) for row in rows], vocabulary=300, hidden=16, layers=1)
    (tmp_path / "here.yaml").write_text(HERE)
    sent = hpcft(f"submit {RUN} --cluster ./here.yaml --name mine --nproc_per_node 1 --max_steps 2", tmp_path, standin)
    assert sent.returncode == 0, sent.stderr
    assert watch.wait_until_ended(tmp_path / "runs/mine", 300).state == "finished"


def ended(folder: Path, plan: Plan) -> RunPaths:
    """A run of ``plan`` in ``folder`` that was submitted there and has ended."""
    furnish(folder, plan)
    paths, environ = RunPaths(folder / "runs" / plan.name), {"HPCFT_JOB": lease.local_job()}
    accept(plan.to_json(), paths, environ)
    lease.release(paths, environ)
    paths.script.write_text(render(plan))
    return paths


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("login", ["the data of this run is not prepared"]),
        ("in_job", ["model: no model is there", "dataset: no such file"]),
    ],
)
def test_resume_from_another_folder_is_refused_before_the_queue(
    tmp_path: Path, standin: dict[str, str], prepare: str, said: list[str]
) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    for program in (sbatch, sbatch.with_name("srun")):
        program.write_text(f"#!/bin/sh\necho $0 >> {tmp_path}/asked\necho Submitted batch job 9\n")
        program.chmod(0o700)
    (tmp_path / "elsewhere").mkdir()
    paths = ended(tmp_path, plan(resources={"prepare": prepare}))
    environ = {**standin, "PATH": f"{sbatch.parent}:/usr/bin:/bin"}
    refused = hpcft(f"resume {paths.root}", tmp_path / "elsewhere", environ)
    assert refused.returncode == 2, refused
    assert all(words in refused.stderr for words in said), refused.stderr
    assert "the folder that it was submitted from" in refused.stderr
    assert not (tmp_path / "asked").exists()
    there = hpcft(f"resume {paths.root}", tmp_path, environ)
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "asked").exists()
