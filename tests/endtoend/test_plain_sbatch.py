"""A script that is committed to a project needs nothing but sbatch."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpcft.slurm.states import State
from tests import tiny
from tests.endtoend.scene import ROOT, Scene
from tests.loopback import LoopbackSlurm


def test_the_committed_loopback_script_trains_with_plain_sbatch_and_again_says_it_is_finished(
    slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    scene = Scene(tmp_path / "a folder with 'quotes' and spaces", slurm)
    rows = tiny.records(600)
    tiny.write_records(scene.folder / "tiny.jsonl", rows)
    tiny.write_model(scene.folder / "tiny-model", (str(row) for row in rows))
    shutil.copy(ROOT / "templates" / "runs" / "tiny.yaml", scene.folder)
    scene.hpcft("prepare", "tiny.yaml", "--cluster", "loopback")

    script = ROOT / "sbatch" / "loopback" / "tiny.sbatch"
    job = sbatch(scene, script)
    scene.slurm.wait_for(job, State.COMPLETED, 600)
    assert scene.wait_for_end("tiny") == "finished"
    assert scene.step("tiny") == 40
    losses = scene.losses("tiny")
    assert losses[40] < losses[1] / 1.5

    again = sbatch(scene, script)
    scene.slurm.wait_for(again, State.COMPLETED, 180)
    assert scene.losses("tiny") == losses


def sbatch(scene: Scene, script: Path) -> str:
    import sys

    environ = {"PYTHONPATH": str(ROOT), "HPCFT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return scene.slurm.run(["sbatch", "--parsable", str(script)], environ=environ, cwd=scene.folder).stdout.strip()
