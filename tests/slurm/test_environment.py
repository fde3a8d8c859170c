"""Nothing of the job one submits from reaches the job one submits."""

import json
import os
import sys

import pytest

from hpcft.slurm.commands import call
from hpcft.slurm.environment import own_job_id, restart_count, scrubbed
from hpcft.slurm.states import State
from tests.loopback import LoopbackSlurm


def test_job_variables_go_and_the_cluster_stays() -> None:
    job = [
        "SLURM_CPU_BIND",
        "SBATCH_PARTITION",
        "SRUN_DEBUG",
        "PMI_RANK",
        "PMIX_ID",
        "MASTER_PORT",
        "RANK",
        "WORLD_SIZE",
    ]
    which = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_CONF_SERVER": "ctl", "SLURM_JWT": "x", "SLURM_CLUSTERS": "b"}
    kept = {**which, "PATH": "/bin", "HOME": "/home/me", "RANKING": "1"}
    assert scrubbed(dict.fromkeys(job, "1") | kept) == kept


def test_scrubbing_changes_a_copy() -> None:
    environ = {"SLURM_JOB_ID": "1"}
    scrubbed(environ)
    assert environ == {"SLURM_JOB_ID": "1"}


def test_sbatch_and_squeue_are_led_to_the_same_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that sbatch sent elsewhere would be unknown to squeue, or be another one's of that number."""
    for name in ("SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "x")
        assert call(["printenv", name]).out == "x\n"
        assert scrubbed(os.environ)[name] == "x"


def test_an_array_element_is_asked_for_by_its_own_id() -> None:
    assert own_job_id({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}) == "12_1"
    assert own_job_id({"SLURM_JOB_ID": "13"}) == "13"
    assert own_job_id({}) is None


def test_the_first_start_has_no_restart_count() -> None:
    assert (restart_count({}), restart_count({"SLURM_RESTART_COUNT": "2"})) == (0, 2)


def test_a_real_rank_environment_comes_out_clean(slurm: LoopbackSlurm) -> None:
    dump = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    job = slurm.submit(f"srun -N1 -n1 --cpu-bind=none {dump} > rank.json", "--gres=gpu:1", "--signal=USR2@60")
    slurm.wait_for(job, State.COMPLETED)
    rank = json.loads((slurm.folder / "rank.json").read_text())
    assert rank["SLURM_JOB_ID"] == job
    left = [name for name in scrubbed(rank) if name.startswith(("SLURM", "SBATCH", "SRUN", "PMI"))]
    assert left == ["SLURM_CONF"]
