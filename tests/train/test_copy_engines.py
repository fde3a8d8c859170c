"""Messages that ranks copy from each other's memory: on real processes, out of files that they all map."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hpcft.plan.plan import Plan
from hpcft.plan.weights import GATHERS, SUMS, reads_peers
from hpcft.train import copy_engines, world
from hpcft.train.copy_engines import Buffers, CopyingGather
from hpcft.train.reduce_scatter import AllToAllReduceScatter
from tests.plans import layout, plan
from tests.train import small

CPU = torch.device("cpu")


class Mapped:
    """A ``Readable`` of this host's processes: a file for each rank's buffer."""

    def __init__(self, stem: str, size: int, group: dist.ProcessGroup) -> None:
        self.size, self.group, self.barriers = size, group, 0
        self.files = [f"{stem}-{rank}" for rank in dist.get_process_group_ranks(group)]

    def get_buffer(self, rank: int, sizes: torch.Size, dtype: torch.dtype, /) -> torch.Tensor:
        whole = torch.from_file(self.files[rank], shared=True, size=self.size, dtype=torch.uint8)
        return whole[: sizes.numel() * dtype.itemsize].view(dtype).view(sizes)

    def barrier(self, channel: int, /) -> None:
        self.barriers += 1
        dist.barrier(self.group)


class Files:
    """What takes the place of symmetric memory, on one rank: files in a folder, mapped.

    patient: one waits for all ranks to come with their memory, as for symmetric memory.
    """

    def __init__(self, folder: Path, patient: bool = True) -> None:
        self.patient, self.folder, self.mapped, self.stems = patient, folder, list[Mapped](), dict[int, str]()

    def symmetric(self, size: int, device: torch.device) -> torch.Tensor:
        stem = str(self.folder / f"buffer-{len(self.stems)}")
        memory = torch.from_file(f"{stem}-{dist.get_rank()}", shared=True, size=size, dtype=torch.uint8)
        self.stems[memory.data_ptr()] = stem
        return memory

    def shared(self, memory: torch.Tensor, group: dist.ProcessGroup) -> Mapped:
        if self.patient:
            dist.barrier(group)
        self.mapped.append(Mapped(self.stems[memory.data_ptr()], memory.numel(), group))
        return self.mapped[-1]


def replace_symmetric_memory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Ranks that are forked from now on copy layers from each other, through files in ``folder``."""
    files = Files(folder)
    monkeypatch.setattr(copy_engines, "linked", lambda plan, world: True)
    monkeypatch.setattr(copy_engines, "symmetric", files.symmetric)
    monkeypatch.setattr(copy_engines, "shared", files.shared)


def outcomes(folder: Path, copied: bool, room: int) -> tuple[list[torch.Tensor], int]:
    """Outputs and gradients of two passes through units whose rows the ranks do not divide; how many barriers."""
    kind, files, group = torch.bfloat16, Files(folder), dist.group.WORLD
    assert group is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = []
    for number in (GATHERS, SUMS) if copied else ():
        memory = [files.symmetric(room, CPU) for _ in range(number)]
        held.append(Buffers(rank, ranks, memory, [files.shared(one, group) for one in memory]))
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (ranks,)), "mp_policy": policy}
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(5)), nn.Linear(10, 3))
    for unit in (*model, model):
        fully_shard(unit, **how)
        unit.set_custom_reduce_scatter(AllToAllReduceScatter(kind, held[1] if copied and unit is not model else None))
        if copied and unit is not model:
            unit.set_custom_all_gather(CopyingGather(held[0]))
    torch.manual_seed(1 + rank)
    found = []
    for _ in range(2):
        output = model(torch.randn(4, 10, dtype=kind))
        output.float().square().sum().backward()
        found += [output.detach().clone(), *(p.grad.to_local().clone() for p in model.parameters())]
    return found, sum(one.barriers for one in files.mapped)


def compared(folder: str, room: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    ours, barriers = outcomes(Path(folder), True, room)
    theirs, none = outcomes(Path(folder), False, room)
    return {"equal": all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "barriers": [barriers, none]}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_copied_messages_are_those_that_are_sent(tmp_path: Path, ranks: int) -> None:
    # Six units; two passes, each with a gather there and back and a sum: two barriers a message.
    for found in small.on_ranks(ranks, compared, str(tmp_path), 4096):
        assert found == {"equal": True, "barriers": [2 * 2 * 6 * 3, 0]}


def test_what_is_too_large_for_a_buffer_is_sent(tmp_path: Path) -> None:
    for found in small.on_ranks(2, compared, str(tmp_path), 100):  # the last layer alone is that small
        assert found == {"equal": True, "barriers": [2 * 2 * 3, 0]}


def test_buffers_are_taken_in_turn_and_those_of_one_kind_only_by_it() -> None:
    nobody: Any = None
    held = Buffers(0, 2, [torch.zeros(8, dtype=torch.uint8) for _ in range(2)], [nobody] * 2)
    taken = [held.take(4, torch.bfloat16, CPU) for _ in range(3)]
    assert taken[0].data_ptr() == taken[2].data_ptr() != taken[1].data_ptr()
    assert all(held.hold(one) for one in taken)
    large = held.take(5, torch.bfloat16, CPU)
    assert len(large) == 5
    assert not held.hold(large)


def asked(folder: str, unable: int, at: str) -> dict[str, Any]:
    """What a rank is told; the one that is ``unable`` fails ``at`` a place, the others do all they can."""
    here = world.join(plan(layout=layout(1, 2), train={"strategy": "fsdp"}), os.environ)
    files = Files(Path(folder), patient=at != "shared")

    def failing(*given: Any) -> Any:
        raise RuntimeError("invalid device ordinal\nand where")

    for name in ("symmetric", "shared"):
        setattr(copy_engines, name, failing if (here.rank, name) == (unable, at) else getattr(files, name))
    found = copy_engines.buffers(here, here.group("dp"), 64, [2, 1])
    return {"found": found if isinstance(found, str) else [len(one.memory) for one in found]}


@pytest.mark.parametrize("at", ["symmetric", "shared"])
def test_one_rank_that_cannot_share_its_memory_keeps_all_from_it_and_none_waits(tmp_path: Path, at: str) -> None:
    assert small.on_ranks(2, asked, str(tmp_path), 1, at) == [{"found": "rank 1: invalid device ordinal"}] * 2


def test_ranks_that_can_have_as_many_buffers_as_they_ask_for(tmp_path: Path) -> None:
    assert small.on_ranks(2, asked, str(tmp_path), -1, "") == [{"found": [2, 1]}] * 2


def test_who_forbids_nccl_to_read_peers_forbids_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with pytest.raises(RuntimeError, match="NCCL_P2P_DISABLE"):
        copy_engines.symmetric(8, CPU)


@pytest.mark.parametrize(
    ("nodes", "strategy", "degrees", "read"),
    [
        (1, "fsdp", {"dp": 4}, True),
        (1, "fsdp", {"dp": 2, "tp": 2}, True),
        (2, "fsdp", {"dp_replicate": 2, "dp": 4}, True),
        (2, "fsdp", {"dp": 8}, False),  # some of them are on the other node
        (1, "fsdp_offload", {"dp": 4}, False),
        (1, "zero3", {"dp": 4}, False),
        (1, "fsdp", {"tp": 4, "dp": 1}, False),
    ],
)
def test_layers_are_copied_where_their_ranks_share_a_node(
    nodes: int, strategy: str, degrees: dict[str, int], read: bool
) -> None:
    assert reads_peers(plan(layout=layout(nodes, 4, **degrees), train={"strategy": strategy})) is read


def test_links_are_what_the_plan_knows_of_them() -> None:
    def known(bandwidth: float, device: str) -> bool:
        links = SimpleNamespace(memory=SimpleNamespace(hardware=SimpleNamespace(node_bandwidth=bandwidth)))
        where: Any = SimpleNamespace(device=torch.device(device))
        return copy_engines.linked(cast("Plan", links), where)

    assert known(360, "cuda")
    assert not known(20, "cuda")
    assert not known(360, "cpu")
    nothing: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not copy_engines.linked(plan(), nothing)
