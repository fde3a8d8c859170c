"""Node names and where to reach them: host lists, addresses, ports, and what each node has."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from hpcft.slurm.commands import SlurmAway, call
from hpcft.slurm.text import number, pairs, word

# Below every system's ephemeral ports (Linux: from 32768), where another program may sit by chance at any time.
PORTS = range(10007, 30007)


@dataclass(frozen=True)
class Node:
    """One node. memory: MiB. gres: as Slurm writes it, ``gpu:h100:8``. state: Slurm's word, flags included."""

    name: str
    address: str
    cpus: int
    memory: int
    gres: str | None
    state: str
    partitions: tuple[str, ...]


def expand_hostlist(text: str) -> list[str]:
    """``n[1-3,07-08]-ib,login`` as node names, as ``scontrol show hostnames`` gives them, without asking Slurm.

    Raises ValueError where the brackets do not close.
    """
    return [name for part in _split(text) for name in _expand(part)]


def node_address(node: str) -> str:
    """NodeAddr of a node: where its peers reach it. Node names need not resolve; without an answer the name must do."""
    try:
        return pairs(call(["scontrol", "-o", "show", "node", node]).out.strip()).get("NodeAddr") or node
    except SlurmAway:
        return node


def nodes() -> dict[str, Node]:
    """Every node by name. Raises SlurmAway."""
    lines = call(["scontrol", "-o", "show", "node"]).out.split("\n")
    return {node.name: node for node in (_node(line) for line in lines if line.startswith("NodeName="))}


def port_for(job_id: str, restart: int, attempt: int, run: str = "") -> int:
    """The rendezvous port of an attempt. Jobs with near ids and attempts of one job get different ones.

    run: its folder, which tells jobs of the same number apart where two Slurms share a machine.
    """
    job, _, element = job_id.partition("_")
    place = 1009 * (number(job) or 0) + 211 * (number(element) or 0) + 17 * restart + attempt + zlib.crc32(run.encode())
    return PORTS.start + place % len(PORTS)


def free_port(first: int, tries: int = 64) -> int:
    """The first port from ``first`` on (wrapping inside PORTS) that can be bound on this machine.

    Raises OSError, naming the range, where none of ``tries`` can.
    """
    for step in range(tries):
        port = PORTS.start + (first - PORTS.start + step) % len(PORTS)
        if _binds(port):
            return port
    raise OSError(f"no free port among {tries} from {first} on")


def _binds(port: int) -> bool:
    # SO_REUSEADDR as torch's store has it: a port in TIME_WAIT after the last attempt is free.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _node(line: str) -> Node:
    facts = pairs(line)
    return Node(
        name=facts["NodeName"],
        address=facts.get("NodeAddr") or facts["NodeName"],
        cpus=number(facts.get("CPUTot")) or 0,
        memory=number(facts.get("RealMemory")) or 0,
        gres=word(facts.get("Gres")),
        state=facts.get("State", ""),
        partitions=tuple(filter(None, (word(facts.get("Partitions")) or "").split(","))),
    )


def _split(text: str) -> Iterator[str]:
    """Comma-separated parts; a comma inside brackets does not separate."""
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text.strip())
    if sum(map(len, parts)) + text.strip().count(",") - sum(part.count(",") for part in parts) != len(text.strip()):
        raise ValueError(f"not a host list: {text!r}")
    return iter(parts)


def _expand(part: str) -> Iterator[str]:
    """One part with any number of brackets; the last bracket runs fastest."""
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, after = rest.partition("]")
    for number_text in _numbers(inside):
        for tail in _expand(after):
            yield before + number_text + tail


def _numbers(inside: str) -> Iterator[str]:
    """``1-3,08-10`` as 1 2 3 08 09 10: the first number's width is kept."""
    for piece in inside.split(","):
        low, dash, high = piece.partition("-")
        if not dash:
            yield piece
            continue
        for value in range(int(low), int(high) + 1):
            yield f"{value:0{len(low)}d}"
