"""Slurm's variables in a process's environment: which job this is, and a copy without any of them."""

from __future__ import annotations

from collections.abc import Mapping

_FAMILIES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "PMI", "OMPI_", "MASTER_", "TORCHELASTIC_")
_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "HPCFT_ATTEMPT",
    }
)
# Which cluster to talk to, and how; the person's own, since Slurm sets none of them for a job but the first.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``environ`` for a new submission: nothing of the job, job step or ranks that it may come from.

    Left in, SBATCH_PARTITION beats the script, SLURM_CPU_BIND pins the new job's ranks to one core, and
    SLURM_GPUS_PER_NODE makes its srun fail. What says which cluster to talk to stays, for sbatch as for squeue.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not (name.startswith(_FAMILIES) or name in _NAMES)
    }


def own_job_id(environ: Mapping[str, str]) -> str | None:
    """The id to ask scontrol about: ``12_3`` in an array (the bare id would mean all elements); None outside Slurm."""
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or None


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm had restarted the job when this process began; the variable is not set the first time."""
    text = environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0
