"""What of a run and a cluster does not fit together, all of it at once, before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping

from hpcft.catalog import AUTO, LATER_OBJECTIVES, LATER_STRATEGIES, OBJECTIVES, STRATEGIES
from hpcft.clock import clock
from hpcft.config.cluster import ClusterProfile
from hpcft.config.run import RunConfig
from hpcft.errors import Problem, near


def check_words(run: RunConfig, where: Mapping[str, str]) -> list[Problem]:
    """Strategy and objective against the catalog."""
    problems = []
    for leaf, word, known, later in (
        ("strategy", run.parallel.strategy, STRATEGIES, LATER_STRATEGIES),
        ("task", run.task, OBJECTIVES, LATER_OBJECTIVES),
    ):
        if word in known or (leaf == "strategy" and word == AUTO):
            continue
        guess = near(word, [*known, *later])
        hint = f"use {later[word]}" if word in later else f"did you mean {guess}?" if guess else ""
        what = "not in this release" if word in later else "no such value"
        problems.append(Problem(f"{leaf}: {what}", where.get(leaf, ""), word, tuple(known), hint))
    if run.parallel.strategy == AUTO:  # looks for a strategy that has the degrees
        return problems
    axes = STRATEGIES[run.parallel.strategy].axes if run.parallel.strategy in STRATEGIES else ()
    for leaf, degree in (("tp", run.parallel.tp), ("dp_replicate", run.parallel.dp_replicate)):
        if degree > 1 and leaf not in axes:
            problems.append(
                Problem(f"parallel.{leaf}: this release spreads data only", where.get(leaf, ""), str(degree), ("1",),
                        "more ranks through nodes and nproc_per_node")
            )  # fmt: skip
    return problems


def check_resources(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str]) -> list[Problem]:
    """Nodes, ranks, partition and time against the profile."""
    problems = []
    ask = run.slurm

    def wrong(leaf: str, what: str, value: object, choices: tuple[str, ...] = (), hint: str = "") -> None:
        problems.append(Problem(f"slurm.{leaf}: {what}", where.get(leaf, ""), str(value), choices, hint))

    partition = ask.partition or cluster.partition
    limits = cluster.partitions.get(partition) if partition else None
    if partition and cluster.partitions and limits is None:
        guess = near(partition, cluster.partitions)
        wrong("partition", f"{cluster.name} has no such partition", partition, tuple(sorted(cluster.partitions)),
              f"did you mean {guess}?" if guess else "")  # fmt: skip
    most = cluster.gpus_per_node or cluster.cores_per_node
    per_node = ask.nproc_per_node or most
    if per_node > most:
        unit, key = ("GPUs", "gpus_per_node") if cluster.gpus_per_node else ("cores", "cores_per_node")
        wrong("nproc_per_node", f"a node of {cluster.name} has {most} {unit}", per_node, (f"1 … {most}",),
              f"more nodes, or {key} in the cluster profile if it is wrong there")  # fmt: skip
    nodes = ask.nodes or 1
    bounds = [n for n in (cluster.max_nodes, limits.max_nodes if limits else None) if n is not None]
    if cluster.scheduler == "none" and nodes > 1:
        wrong("nodes", "this machine is one node", nodes, ("1",), "give a cluster profile: --cluster NAME")
    elif bounds and nodes > min(bounds):
        wrong("nodes", f"{partition or cluster.name} gives at most {min(bounds)} nodes to a job", nodes,
              (f"1 … {min(bounds)}",), _roomier(cluster, nodes))  # fmt: skip
    time = ask.time or cluster.time
    if limits and limits.max_time and time > limits.max_time:
        wrong(
            "time",
            f"{partition} allows at most {clock(limits.max_time)}",
            clock(time),
            hint="the run requeues itself at the limit and goes on",
        )
    if cluster.scheduler == "slurm" and time * 60 <= cluster.signal_lead + 60:
        wrong(
            "time",
            f"shorter than the warning of {cluster.signal_lead} s before its end and a minute to train",
            clock(time),
            hint="a longer time, or a shorter signal_lead in the cluster profile",
        )
    return problems


def _roomier(cluster: ClusterProfile, nodes: int) -> str:
    """The hint that names the partitions in which so many nodes may be had."""
    if cluster.max_nodes and nodes > cluster.max_nodes:
        return ""
    roomy = [name for name, limits in cluster.partitions.items() if limits.max_nodes and limits.max_nodes >= nodes]
    return f"so many are allowed in: {', '.join(sorted(roomy))}" if roomy else ""
