"""The environment of every rank, variable by variable, each with its reason; the script shows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpcft.plan.plan import Variable

MOST_THREADS = 8  # of OpenMP per rank that has a GPU


def environment(
    *,
    fabric: str,
    accelerator: str,
    interface: str | None,
    ib_hcas: Sequence[str],
    nodes: int,
    cpus_per_rank: int,
    dataloader_workers: int,
    hf_home: str | None,
    node_cache: str,
    own: Mapping[str, str],
) -> tuple[Variable, ...]:
    """The table for one cluster. ``own``: the profile's variables, which win over ours of the same name."""
    table = [
        *_python(cpus_per_rank, dataloader_workers, accelerator),
        *_caches(hf_home, node_cache),
        *_sockets(fabric, interface, accelerator, nodes),
        *(_nccl(fabric, accelerator, ib_hcas, nodes) if accelerator != "cpu" else ()),
    ]
    kept = [variable for variable in table if variable.name not in own]
    return (*kept, *(Variable(name=k, value=v, reason="from the cluster profile") for k, v in own.items()))


def _python(cpus: int, workers: int, accelerator: str) -> list[Variable]:
    spare = max(1, cpus - workers)
    threads = spare if accelerator == "cpu" else min(MOST_THREADS, spare)
    most = f"; more than {MOST_THREADS} do not help beside a GPU" if threads < spare else ""
    table = [
        Variable(name="PYTHONUNBUFFERED", value="1", reason="a killed rank's last words reach its log"),
        Variable(
            name="OMP_NUM_THREADS",
            value=str(threads),
            reason=f"{cpus} cores a rank less {workers} data threads{most}; unset, each rank takes all of the node",
        ),
        Variable(
            name="TOKENIZERS_PARALLELISM", value="false", reason="ranks never tokenise; forked threads would warn"
        ),
    ]
    if accelerator == "cuda":  # torch has it for NVIDIA's driver only
        table.append(
            Variable(
                name="PYTORCH_ALLOC_CONF",
                value="expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
                reason="windows differ in length, and fixed segments would fragment the card; eight threads lock the "
                "host memory into which a checkpoint is copied, as one takes four times as long",
            )
        )
    return table


def _caches(hf_home: str | None, node_cache: str) -> list[Variable]:
    job = "${SLURM_JOB_ID:-local}"
    table = [
        Variable(
            name="HF_HUB_OFFLINE",
            value="1",
            reason="models and data were fetched before the job; a thousand ranks must not ask the hub",
        ),
        Variable(
            name="TRITON_CACHE_DIR",
            value=f"{node_cache}/hpcft-{job}/triton",
            reason="node-local: Triton's cache on NFS ends in stale file handles",
        ),
        Variable(
            name="TORCHINDUCTOR_CACHE_DIR",
            value=f"{node_cache}/hpcft-{job}/inductor",
            reason="node-local, for the same reason",
        ),
    ]
    if hf_home:
        table.insert(0, Variable(name="HF_HOME", value=hf_home, reason="one copy of the weights for all nodes"))
    return table


def _sockets(fabric: str, interface: str | None, accelerator: str, nodes: int) -> list[Variable]:
    name = interface or ("lo" if fabric == "loopback" else None)
    if name is None or (nodes == 1 and fabric != "loopback"):
        return []
    table = [Variable(name="GLOO_SOCKET_IFNAME", value=name, reason="control messages go over the nodes' own network")]
    if accelerator != "cpu":
        table.append(
            Variable(
                name="NCCL_SOCKET_IFNAME",
                value=name,
                reason="NCCL's first contact; unset it may pick a management network",
            )
        )
    return table


def _nccl(fabric: str, accelerator: str, hcas: Sequence[str], nodes: int) -> list[Variable]:
    table = [Variable(name="NCCL_DEBUG", value="WARN", reason="silent until something is wrong")]
    if nodes == 1:
        return table
    if fabric == "infiniband":
        if hcas:
            table.append(
                Variable(
                    name="NCCL_IB_HCA",
                    value="=" + ",".join(hcas),
                    reason="these adapters exactly; a bonded or storage one among them would slow down every rank",
                )
            )
        table.append(
            Variable(
                name="NCCL_IB_TIMEOUT",
                value="22",
                reason="4.096 µs × 2^22 = 17 s until a lost packet is sent again; busy fabrics pause long",
            )
        )
    elif fabric == "slingshot":
        table += [
            Variable(
                name="NCCL_NET_GDR_LEVEL",
                value="PHB",
                reason="network cards read the memory of the GPUs of their own NUMA domain directly",
            ),
            Variable(
                name="NCCL_CROSS_NIC",
                value="1",
                reason="traffic may leave a node by one network card and enter the next by another",
            ),
            Variable(
                name="FI_CXI_DISABLE_HOST_REGISTER",
                value="1",
                reason="avoids a deadlock between libfabric and GPU allocations",
            ),
            Variable(
                name="FI_MR_CACHE_MONITOR",
                value="userfaultfd",
                reason="the default monitor can hang with GPU allocators",
            ),
        ]
    elif fabric == "ethernet":
        table.append(
            Variable(
                name="NCCL_IB_DISABLE", value="1", reason="no InfiniBand here: do not spend start-up looking for it"
            )
        )
    elif fabric == "loopback":
        table.append(Variable(name="NCCL_IB_DISABLE", value="1", reason="the nodes are one machine"))
    return table
