"""The environment of a rank: what each profile sets, and nothing that it does not need."""

from __future__ import annotations

import re

import pytest

from hpcft.plan.fabric import environment
from hpcft.plan.plan import Plan, Variable
from tests.words import PROFILES, plan, profile

ALWAYS = {"PYTHONUNBUFFERED", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"}
ALWAYS |= {"HF_HUB_OFFLINE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}


def table(made: Plan) -> dict[str, str]:
    return {variable.name: variable.value for variable in made.environment}


def on(cluster: str, nodes: int) -> Plan:
    return plan(f"--nodes {nodes} --time 20", cluster)


SEVERAL = [name for name in PROFILES if profile(name).scheduler == "slurm"]


@pytest.mark.parametrize("cluster", PROFILES)
def test_every_variable_has_a_reason_and_stands_once(cluster: str) -> None:
    for nodes in (1, 2) if cluster in SEVERAL else (1,):
        made = on(cluster, nodes).environment
        assert all(len(variable.reason.split()) >= 3 for variable in made)
        assert len({variable.name for variable in made}) == len(made)
        assert {variable.name for variable in made} >= ALWAYS


ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (
            "infiniband-h100",
            {
                "HF_HOME": "${SCRATCH}/huggingface",
                "PYTORCH_ALLOC_CONF": ALLOCATOR,
                "GLOO_SOCKET_IFNAME": "ib0",
                "NCCL_SOCKET_IFNAME": "ib0",
                "NCCL_DEBUG": "WARN",
                "NCCL_IB_HCA": "=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7",
                "NCCL_IB_TIMEOUT": "22",
            },
        ),
        (
            "slingshot-mi250x",
            {
                "HF_HOME": "${SCRATCH}/huggingface",
                "GLOO_SOCKET_IFNAME": "hsn0",
                "NCCL_SOCKET_IFNAME": "hsn0",
                "NCCL_DEBUG": "WARN",
                "NCCL_NET_GDR_LEVEL": "PHB",
                "NCCL_CROSS_NIC": "1",
                "FI_CXI_DISABLE_HOST_REGISTER": "1",
                "FI_MR_CACHE_MONITOR": "userfaultfd",
            },
        ),
        (
            "cloud-spot",
            {
                "HF_HOME": "/shared/huggingface",
                "PYTORCH_ALLOC_CONF": ALLOCATOR,
                "GLOO_SOCKET_IFNAME": "eth0",
                "NCCL_SOCKET_IFNAME": "eth0",
                "NCCL_DEBUG": "WARN",
                "NCCL_IB_DISABLE": "1",
            },
        ),
        ("loopback", {"GLOO_SOCKET_IFNAME": "lo"}),
    ],
)
def test_several_nodes_get_the_table_of_their_fabric(cluster: str, expected: dict[str, str]) -> None:
    made = table(on(cluster, 2))
    assert {name: value for name, value in made.items() if name not in ALWAYS} == expected


@pytest.mark.parametrize("cluster", PROFILES)
def test_one_node_gets_nothing_of_a_network_it_does_not_use(cluster: str) -> None:
    network = {name for name in table(on(cluster, 1)) if re.match("NCCL_(IB|NET|CROSS)|FI_|.*IFNAME", name)}
    assert all(table(on(cluster, 1))[name] == "lo" for name in network)


@pytest.mark.parametrize("cluster", PROFILES)
def test_a_cpu_run_hears_nothing_of_nccl(cluster: str) -> None:
    if profile(cluster).accelerator == "cpu":
        assert not any("NCCL" in name or "CUDA" in name for name in table(on(cluster, 1)))


@pytest.mark.parametrize("cluster", PROFILES)
def test_gloo_gets_the_whole_name_of_an_interface_since_it_takes_no_prefix(cluster: str) -> None:
    name = table(on(cluster, 2 if cluster in SEVERAL else 1)).get("GLOO_SOCKET_IFNAME", "lo")
    assert name == "lo" or name[-1].isdigit()


@pytest.mark.parametrize("cluster", PROFILES)
def test_no_value_names_this_machine(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/somebody")
    assert "somebody" not in on(cluster, 1).to_json()


def made(**changes: object) -> tuple[Variable, ...]:
    arguments: dict[str, object] = {
        "fabric": "ethernet",
        "accelerator": "cuda",
        "interface": None,
        "ib_hcas": (),
        "nodes": 2,
        "cpus_per_rank": 8,
        "dataloader_workers": 2,
        "hf_home": None,
        "node_cache": "/tmp",
        "own": {},
    }
    return environment(**{**arguments, **changes})  # type: ignore[arg-type]


def test_the_profiles_own_variables_win_and_say_where_they_are_from() -> None:
    found = made(own={"NCCL_DEBUG": "INFO", "MINE": "1"})
    mine = {variable.name: variable for variable in found}
    assert (mine["NCCL_DEBUG"].value, mine["MINE"].value) == ("INFO", "1")
    assert mine["MINE"].reason == "from the cluster profile"
    assert len(mine) == len(found)


def test_an_interface_nobody_named_is_left_to_be_found() -> None:
    assert not any("IFNAME" in variable.name for variable in made())


@pytest.mark.parametrize(
    ("cpus", "workers", "accelerator", "threads"),
    [(8, 2, "cuda", "6"), (64, 2, "cuda", "8"), (2, 4, "cuda", "1"), (64, 2, "cpu", "62"), (1, 0, "cpu", "1")],
)
def test_threads_leave_room_for_the_data_and_never_vanish(
    cpus: int, workers: int, accelerator: str, threads: str
) -> None:
    found = made(cpus_per_rank=cpus, dataloader_workers=workers, accelerator=accelerator)
    assert next(variable.value for variable in found if variable.name == "OMP_NUM_THREADS") == threads
