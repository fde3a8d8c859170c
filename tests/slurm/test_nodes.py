"""Host lists, addresses and ports."""

from __future__ import annotations

import socket

import pytest

from hpcft.slurm.nodes import PORTS, expand_hostlist, free_port, node_address, nodes, port_for
from tests.loopback import LoopbackSlurm

LISTS = [
    "n1",
    "n[1-4]",
    "n[1-3,7,9-11]",
    "gpu[007-012]",
    "a1,b[1-2],c",
    "rack[1-2]node[01-03]",
    "x[1,3]y[2-4],login-0",
    "node-a[9-11]",
    "n[1-2],n[1-2]",
    "n[098-102]",
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n[1-2],m[08-10]-ib", ["n1", "n2", "m08-ib", "m09-ib", "m10-ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("", []),
    ],
)
def test_a_folded_list_is_unfolded(text: str, names: list[str]) -> None:
    assert expand_hostlist(text) == names


@pytest.mark.parametrize("text", ["n[1-2", "n1]", "n[[1]]"])
def test_brackets_that_do_not_match_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a host list"):
        expand_hostlist(text)


def test_lists_unfold_as_scontrol_unfolds_them(slurm: LoopbackSlurm) -> None:
    for text in LISTS:
        assert expand_hostlist(text) == slurm.run(["scontrol", "show", "hostnames", text]).stdout.split(), text


def test_a_node_is_reached_at_the_address_slurm_has_for_it(slurm: LoopbackSlurm) -> None:
    assert node_address("n2") == "127.0.0.1"
    assert node_address("no-such-node") == "no-such-node"


def test_without_slurm_a_node_is_reached_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert node_address("n2") == "n2"


def test_every_node_is_read_with_what_it_has(slurm: LoopbackSlurm) -> None:
    assert sorted(nodes()) == ["n1", "n2", "n3", "n4"]
    assert (nodes()["n3"].cpus, nodes()["n3"].memory, nodes()["n3"].gres) == (4, 4000, "gpu:2")
    assert set(nodes()["n3"].partitions) == {"batch", "low", "low0", "high"}


def test_ports_lie_below_the_ephemeral_range_and_neighbours_do_not_meet() -> None:
    near = {port_for(str(job), 0, 1) for job in range(5000, 5019)}
    assert len(near) == 19
    assert len({port_for("77", restart, attempt) for restart in range(10) for attempt in range(1, 11)}) == 100
    assert len({port_for(f"12_{element}", 0, 1) for element in range(50)}) == 50
    assert all(port in PORTS and port < 32768 for port in near)
    assert port_for("77", 1, 2) == port_for("77", 1, 2)


def test_a_taken_port_is_passed_over() -> None:
    first = free_port(PORTS.start)
    with socket.socket() as holder:
        holder.bind(("", first))
        holder.listen()
        assert free_port(first) in set(PORTS) - {first}


def test_the_last_port_is_followed_by_the_first() -> None:
    last = PORTS.stop - 1
    with socket.socket() as holder:
        holder.bind(("", last))
        holder.listen()
        assert PORTS.start <= free_port(last) < last
