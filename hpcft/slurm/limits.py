"""What the controller's configuration means for a run: may it requeue, how long does it get, what warns it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpcft.slurm.commands import call
from hpcft.slurm.text import number, word


@dataclass(frozen=True)
class Limits:
    """Facts of ``scontrol show config``. Times are seconds.

    kill_wait: from the second TERM to KILL. min_job_age: how long squeue and scontrol remember a finished job.
    user_signal: a preemption sends the job's own ``--signal`` instead of TERM. accounting: sacct has answers.
    max_array_size: elements of one array, numbered from 0; script_bytes: the largest batch script that is taken.
    """

    cluster: str
    version: str
    max_array_size: int
    script_bytes: int
    job_requeue: bool
    kill_wait: int
    min_job_age: int
    preempt_mode: str
    preempt_type: str
    user_signal: bool
    accounting: bool
    requeue_exit: tuple[int, ...]


def limits() -> Limits:
    """The limits of the cluster that SLURM_CONF names. Raises SlurmAway."""
    return parse_limits(call(["scontrol", "show", "config"]).out)


def parse_limits(text: str) -> Limits:
    """Read the ``Key = value`` lines of ``scontrol show config``; Slurm's own defaults where a line is not there."""
    facts = dict(re.findall(r"^(\S+)\s*= ?(.*)$", text, re.MULTILINE))
    parameters = f"{facts.get('SlurmctldParameters', '')},{facts.get('PreemptParameters', '')}"
    scheduling = facts.get("SchedulerParameters", "")
    return Limits(
        cluster=word(facts.get("ClusterName")) or "",
        version=word(facts.get("SLURM_VERSION")) or "",
        max_array_size=min(_number(facts, "MaxArraySize", 1001), _among(scheduling, "max_array_tasks", 4_000_001)),
        script_bytes=_among(scheduling, "max_script_size", 4 * 2**20),
        job_requeue=_number(facts, "JobRequeue", 1) == 1,
        kill_wait=_number(facts, "KillWait", 30),
        min_job_age=_number(facts, "MinJobAge", 300),
        preempt_mode=facts.get("PreemptMode", "OFF").strip().lower(),
        preempt_type=(word(facts.get("PreemptType")) or "none").removeprefix("preempt/"),
        user_signal="send_user_signal" in parameters,
        accounting=not facts.get("AccountingStorageType", "none").strip().endswith("none"),
        requeue_exit=tuple(int(code) for code in re.findall(r"\d+", facts.get("RequeueExit", ""))),
    )


def _number(facts: dict[str, str], key: str, default: int) -> int:
    found = number(facts.get(key))
    return default if found is None else found


def _among(parameters: str, key: str, default: int) -> int:
    """One number in ``a=1,b=2``."""
    found = re.search(rf"(?:^|[\s,]){key}=(\d+)", parameters)
    return int(found[1]) if found else default
