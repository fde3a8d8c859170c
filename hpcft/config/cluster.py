"""What a person may say about a cluster: one profile, shared by every run on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from hpcft.config.fields import SBATCH_OPTION, Features, Line, Minutes, Name, Word
from hpcft.config.run import Section


class Partition(Section):
    """Limits of one partition, so that a wrong request is refused before the queue."""

    max_time: Minutes | None = Field(None, description="Longest time limit.")
    max_nodes: int | None = Field(None, ge=1, description="Most nodes a job may have.")
    preemption: Literal["requeue", "cancel", "none"] = Field(
        "none", description="What happens to a job that must make room: requeue, cancel, or none (it never must)."
    )
    grace: int = Field(0, ge=0, description="Seconds between the warning and the kill when preempted (GraceTime).")


class PrepareJob(Section):
    """The job that prepares data, where the profile says ``prepare: job``: one node, no GPUs."""

    partition: Word | None = Field(None, description="A partition of nodes without GPUs. null: the run's own.")
    qos: Word | None = Field(None, description="Its quality of service. null: the site's default.")
    cores: int = Field(8, ge=1, le=512, description="CPU cores; as many processes prepare.")
    mem: Word | None = Field("16G", description="Memory; half a GiB a core and what the largest record needs.")
    time: Minutes = Field(240, description="Time limit; what is finished by then is not done again.")
    extra: tuple[Annotated[str, StringConstraints(pattern=SBATCH_OPTION)], ...] = Field(
        (), description="Further sbatch options of this job."
    )


class ClusterProfile(Section):
    """One cluster, or this machine."""

    name: Name = Field(description="Name of the profile.")
    scheduler: Literal["slurm", "none"] = Field("slurm", description="none: this machine, without Slurm.")
    accelerator: Literal["cuda", "rocm", "cpu"] = Field("cuda", description="What a rank computes on.")
    gpu_type: Word | None = Field(None, description="Model of the GPUs, as Slurm's GRES names it: h100, a100, mi250x.")
    gpu_memory: float | None = Field(
        None, gt=0, le=1024, description="Memory of one GPU in GiB. null: what its type has; say it of an A100 or V100."
    )
    gpus_per_node: int = Field(0, ge=0, le=64, description="GPUs of a node; 0 on a CPU cluster.")
    cores_per_node: int = Field(ge=1, description="CPU cores of a node that jobs may use.")
    node_memory: float | None = Field(
        None, gt=0, description="Memory of a node in GiB, for offloading to it. null: not checked."
    )
    max_nodes: int | None = Field(None, ge=1, description="Nodes of the cluster.")
    gpu_request: Literal["gres", "gres_typed", "gpus_per_node", "none"] = Field(
        "gres", description="How GPUs are asked for: --gres=gpu:8, --gres=gpu:h100:8, --gpus-per-node=8, or not at all."
    )
    fabric: Literal["infiniband", "slingshot", "ethernet", "loopback"] = Field(
        "ethernet", description="What connects the nodes; it decides NCCL's settings."
    )
    node_bandwidth: float | None = Field(
        None, gt=0, description="GB/s that a GPU has to those of its node in large collectives. null: by its type."
    )
    fabric_bandwidth: float | None = Field(
        None, gt=0, description="GB/s that a node has to the others, its adapters together. null: by the fabric."
    )
    interface: Word | None = Field(
        None, description="Network interface of the nodes' own traffic: ib0, hsn0, eth0. null: found at run time."
    )
    ib_hcas: tuple[Word, ...] = Field((), description="InfiniBand adapters NCCL may use; empty: NCCL finds them.")
    partition: Word | None = Field(None, description="Default partition.")
    partitions: dict[Word, Partition] = Field(
        {}, description="The partitions and their limits; empty: not checked here."
    )
    account: Word | None = Field(None, description="Default account.")
    qos: Word | None = Field(None, description="Default quality of service.")
    constraint: Features | None = Field(None, description="Default node features.")
    time: Minutes = Field(240, description="Default time limit.")
    mem: Word | None = Field(
        "0",
        description='Memory per node; "0" is all of it, for jobs that use all its GPUs; null leaves it to the site.',
    )
    exclusive: bool = Field(False, description="Whole nodes, always.")
    extra: tuple[Annotated[str, StringConstraints(pattern=SBATCH_OPTION)], ...] = Field(
        (), description="Further sbatch options of your site, such as --mail-type=END."
    )
    setup: tuple[Line, ...] = Field(
        (), description="Shell lines before Python starts: modules, conda, a virtual environment."
    )
    environment: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(
        {},
        description="Further environment variables for every rank; they win over ours. No secrets: scripts show them.",
    )
    runs: Line | None = Field(None, description="Where run folders lie. null: runs/ in the submit directory.")
    store: Line = Field(
        "prepared", description="Where prepared data lies: on the shared file system; may start with $SCRATCH."
    )
    hf_home: Line | None = Field(
        None, description="Hugging Face cache on the shared file system. null: your own HF_HOME."
    )
    node_cache: Line = Field("${TMPDIR:-/tmp}", description="Node-local folder for compile caches.")
    launcher: Literal["srun", "torchrun"] = Field(
        "srun", description="srun: a task per rank; torchrun: a task per node that starts its ranks."
    )
    signal_lead: int = Field(
        180, ge=90, le=3600, description="Seconds before the time limit at which the ranks are warned; save time + 60."
    )
    prepare: Literal["login", "in_job", "job"] = Field(
        "login",
        description="Where data is prepared: by submit on this machine, at the start of the training job, or by a job "
        "of its own without GPUs, for which the training waits.",
    )
    prepare_job: PrepareJob | None = Field(None, description="What `prepare: job` asks for.")
    template: Line | None = Field(None, description="A script template of your own, in place of ours.")
