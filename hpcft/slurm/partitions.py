"""The partitions of the cluster and their limits, from ``scontrol show partition``."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.slurm.commands import call
from hpcft.slurm.text import minutes, number, pairs, word


@dataclass(frozen=True)
class Partition:
    """One partition. None means: no limit. preempt_mode: what happens to jobs in it: off, requeue, cancel, suspend.

    grace: seconds between the warning and the end when a job in it is preempted.
    """

    name: str
    default: bool
    up: bool
    max_minutes: int | None
    default_minutes: int | None
    max_nodes: int | None
    nodes: str | None  # as Slurm folds it: n[1-4]
    total_nodes: int
    total_cpus: int
    preempt_mode: str
    grace: int
    priority_tier: int


def partitions() -> dict[str, Partition]:
    """Every partition that this user may see, by name. Raises SlurmAway."""
    lines = call(["scontrol", "-o", "show", "partition"]).out.split("\n")
    found = (_partition(line) for line in lines if line.startswith("PartitionName="))
    return {partition.name: partition for partition in found}


def _partition(line: str) -> Partition:
    facts = pairs(line)
    return Partition(
        name=facts["PartitionName"],
        default=facts.get("Default") == "YES",
        up=facts.get("State") == "UP",
        max_minutes=minutes(facts.get("MaxTime")),
        default_minutes=minutes(facts.get("DefaultTime")),
        max_nodes=number(facts.get("MaxNodes")),
        nodes=word(facts.get("Nodes")),
        total_nodes=number(facts.get("TotalNodes")) or 0,
        total_cpus=number(facts.get("TotalCPUs")) or 0,
        preempt_mode=facts.get("PreemptMode", "OFF").lower(),
        grace=number(facts.get("GraceTime")) or 0,
        priority_tier=number(facts.get("PriorityTier")) or 0,
    )
