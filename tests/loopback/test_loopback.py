"""The private Slurm itself: it comes up beside another one, and nothing is left of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.slurm.states import State
from tests.loopback import LoopbackSlurm, processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path; pytest's are too long for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="hpcft-") as folder:
        yield Path(folder) / "slurm"


def test_a_second_cluster_stands_beside_the_first_and_leaves_nothing(slurm: LoopbackSlurm) -> None:
    with LoopbackSlurm(nodes=2) as second:
        job = second.submit("srun sleep 300", "--nodes=2", "--job-name=second")
        second.wait_for(job, State.RUNNING)
        assert "second" in second.run(["squeue", "-h", "-o", "%j"]).stdout
        assert "second" not in slurm.run(["squeue", "-h", "-o", "%j"]).stdout
        folder = second.folder
    assert not folder.exists()
    assert [processes.daemons_of(folder, name) + processes.ranks_of(folder, name) for name in ("n1", "n2")] == [[], []]
    assert slurm.is_up


def test_a_dead_node_takes_its_ranks_with_it_and_comes_back(slurm: LoopbackSlurm) -> None:
    job = slurm.submit("sleep 300 & wait", "--nodelist=n4")
    slurm.wait_for(job, State.RUNNING)
    slurm.kill_node("n4")
    assert processes.ranks_of(slurm.folder, "n4") + processes.daemons_of(slurm.folder, "n4") == []
    slurm.start_node("n4")
    slurm.run(["scancel", job])
    slurm.wait_for(job, State.CANCELLED)


def test_pretend_gpus_are_given_to_tasks(slurm: LoopbackSlurm) -> None:
    said = slurm.run(["srun", "--nodes=2", "--gres=gpu:2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]).stdout
    assert said.split() == ["0,1", "0,1"]


def test_people_start_it_ask_after_it_and_stop_it(slurm: LoopbackSlurm, short: Path) -> None:
    def loopback(verb: str) -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-m", "tests.loopback", verb, "--folder", str(short), "--nodes=1"]
        return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)

    try:
        up = loopback("up")
        assert up.returncode == 0, up.stderr
        assert f"export SLURM_CONF={short}/slurm.conf" in up.stdout
        assert loopback("status").stdout.splitlines()[0].startswith("PARTITION")
        again = loopback("up")
        assert (again.returncode, "export SLURM_CONF" in again.stdout) == (0, True)
    finally:
        down = loopback("down")
    assert down.stderr == "The private Slurm is down.\n"
    assert loopback("status").returncode == 1
    assert processes.daemons_of(short, "n1") == []


def test_a_folder_with_something_else_in_it_is_left_alone(short: Path) -> None:
    short.mkdir()
    (short / "thesis.tex").touch()
    with pytest.raises(RuntimeError, match="not empty and not a private Slurm's"):
        LoopbackSlurm(short).up()
    assert os.listdir(short) == ["thesis.tex"]


def test_a_path_too_long_for_sockets_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too long for Unix sockets"):
        LoopbackSlurm(tmp_path / ("long" * 20)).up()
