"""The configuration files of the private Slurm, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A node claims more than the machine has (config_overrides lets it), so that a laptop can hold a four-node job.
CPUS = 4
MEMORY = 4000  # MiB
TASK_PROLOG = "task-prolog.sh"


@dataclass(frozen=True)
class Layout:
    """What the cluster is made of. ports: one for the controller, then one for each node.

    devices: files that stand for each node's GPUs, or ``/dev/nvidia0`` … where they are real; empty: no GPUs.
    """

    folder: Path
    host: str
    user: str
    nodes: tuple[str, ...]
    ports: Sequence[int]
    devices: tuple[tuple[str, ...], ...] = ()
    socket: str = ""

    @property
    def real(self) -> bool:
        return any(device.startswith("/dev/nvidia") for devices in self.devices for device in devices)

    @property
    def gpus(self) -> int:
        return len(self.devices[0]) if self.devices else 0


def slurm_conf(layout: Layout) -> str:
    """slurm.conf: cons_tres on loopback, preemption by partition, every waiting time as short as Slurm allows."""
    folder, gres = layout.folder, f" Gres=gpu:{layout.gpus}" if layout.gpus else ""
    lines = [
        "ClusterName=loopback",
        f"SlurmctldHost={layout.host}(127.0.0.1)",
        f"SlurmUser={layout.user}",
        f"SlurmdUser={layout.user}",
        "AuthType=auth/munge",
        # A requeued job waits until credentials of its last start have run out (cred_expire, 120 s by default), so
        # that a node cannot mistake the new start for the old one. Five seconds, the least Slurm takes, makes a
        # restart testable. Never lower it on a real cluster: there, a restart on a node that was away may then
        # die with "Job credential revoked".
        f"AuthInfo=socket={layout.socket},cred_expire=5",
        f"SlurmctldPort={layout.ports[0]}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "JobRequeue=1",
        "ReturnToService=2",
        "KillWait=10",
        "SlurmdTimeout=20",
        "MailProg=/bin/true",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=2,bf_interval=1",
    ]
    if layout.gpus:
        lines.append("GresTypes=gpu")
    if layout.real:
        lines.append(f"TaskProlog={folder}/{TASK_PROLOG}")
    for node, port in zip(layout.nodes, layout.ports[1:], strict=True):
        at = f"NodeHostname={layout.host} NodeAddr=127.0.0.1 Port={port}"
        lines.append(f"NodeName={node} {at} CPUs={CPUS} RealMemory={MEMORY}{gres}")
    every = ",".join(layout.nodes)
    lines += [
        f"PartitionName=batch Nodes={every} Default=YES PriorityTier=1 PreemptMode=OFF MaxTime=1-00:00:00",
        f"PartitionName=low Nodes={every} PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=2:00:00",
        f"PartitionName=low0 Nodes={every} PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=2:00:00",
        f"PartitionName=high Nodes={every} PriorityTier=10 PreemptMode=OFF MaxTime=UNLIMITED",
    ]
    return "\n".join(lines) + "\n"


def task_prolog(layout: Layout) -> str:
    """What a task's environment becomes on each node when the GPUs are real.

    Slurm numbers a node's GPUs from 0, and all "nodes" are one machine: each must be told its own. NCCL would take
    them for one host too and never use the network between them.
    """
    cases = [
        f'    {node}) echo "export CUDA_VISIBLE_DEVICES={",".join(d.removeprefix("/dev/nvidia") for d in devices)}" ;;'
        for node, devices in zip(layout.nodes, layout.devices, strict=True)
    ]
    told = ['case "$SLURMD_NODENAME" in', *cases, "esac", 'echo "export NCCL_HOSTID=$SLURMD_NODENAME"']
    return "\n".join(["#!/bin/sh", *told]) + "\n"


def gres_conf(layout: Layout) -> str:
    """gres.conf: which files are each node's GPUs."""
    rows = zip(layout.nodes, layout.devices, strict=bool(layout.devices))
    return "".join(f"NodeName={node} Name=gpu File={','.join(devices)}\n" for node, devices in rows)


def cgroup_conf() -> str:
    """cgroup.conf: read by slurmd even where nothing uses cgroups; without systemd it would refuse to start."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return f"CgroupPlugin=cgroup/{'v2' if unified else 'v1'}\nIgnoreSystemd=yes\n"
