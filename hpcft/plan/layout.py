"""Where every rank sits: nodes × GPUs × axes, in plain integers, so that any cluster size is checked in milliseconds.

Ranks are numbered node by node (Slurm's block distribution and torchrun agree on this). The mesh axes are read
as a mixed-radix number whose last digit runs fastest: the tensor axis comes last, so its ranks are neighbours
and stay inside one node, where the fast links are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hpcft.errors import refuse


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh. degree: how many ranks lie along it, at least 1."""

    name: str
    degree: int


@dataclass(frozen=True)
class Place:
    """One rank: global rank, node index, rank inside the node, and its coordinate on every axis."""

    rank: int
    node: int
    local_rank: int
    coordinates: Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """nodes × ranks_per_node ranks, arranged on ``axes`` (outermost first, product = number of ranks).

    Raises Refusal where the axes do not multiply to the ranks or the tensor axis would leave its node.
    """

    nodes: int
    ranks_per_node: int
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        product = math.prod(axis.degree for axis in self.axes)
        if product != self.world_size:
            arithmetic = " × ".join(f"{axis.name} {axis.degree}" for axis in self.axes)
            raise refuse(
                f"the axes multiply to {arithmetic} = {product}, but there are "
                f"{self.nodes} nodes × {self.ranks_per_node} ranks = {self.world_size} ranks",
                hint="choose degrees whose product is the number of ranks",
            )
        if self.ranks_per_node % self.degree("tp"):
            valid = [d for d in range(1, self.ranks_per_node + 1) if self.ranks_per_node % d == 0]
            raise refuse(
                f"parallel.tp: {self.degree('tp')} does not divide the {self.ranks_per_node} ranks of a node, "
                "so a tensor group would span nodes",
                value=self.degree("tp"),
                choices=valid,
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def data_parallel(self) -> int:
        """Number of ranks that read different data: the product of the data axes."""
        return math.prod(axis.degree for axis in self.axes if axis.name.startswith("dp"))

    def degree(self, name: str) -> int:
        """Degree of the axis ``name``; an axis that is not there has degree 1."""
        return next((axis.degree for axis in self.axes if axis.name == name), 1)

    @property
    def data_inside_nodes(self) -> bool:
        """Do all ranks that differ along ``dp`` alone share a node?"""
        return self.ranks_per_node % (self.degree("dp") * self.degree("tp")) == 0

    def place(self, rank: int) -> Place:
        """The place of ``rank``; raises IndexError outside 0 … world_size - 1."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of {self.world_size}")
        coordinates: dict[str, int] = {}
        rest = rank
        for axis in reversed(self.axes):
            rest, coordinates[axis.name] = divmod(rest, axis.degree)
        return Place(
            rank, *divmod(rank, self.ranks_per_node), {axis.name: coordinates[axis.name] for axis in self.axes}
        )

    def data_coordinate(self, rank: int) -> int:
        """Which of the ``data_parallel`` readers ``rank`` is; ranks of one tensor group share it."""
        place = self.place(rank)
        index = 0
        for axis in self.axes:
            if axis.name.startswith("dp"):
                index = index * axis.degree + place.coordinates[axis.name]
        return index

    def groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ only along ``name``, group by group; together they partition the world."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinates = self.place(rank).coordinates
            key = tuple(c for axis, c in coordinates.items() if axis != name)
            groups.setdefault(key, []).append(rank)
        return tuple(tuple(group) for group in groups.values())


def mesh(nodes: int, ranks_per_node: int, tp: int = 1, dp_replicate: int = 1) -> Layout:
    """The usual axes: replicas outermost (over nodes, where links are slow), then sharded data, then tensors.

    Raises Refusal where they do not multiply to the ranks.
    """
    ranks = nodes * ranks_per_node
    axes = [Axis("dp", max(1, ranks // (tp * dp_replicate))), Axis("tp", tp)]
    return Layout(nodes, ranks_per_node, tuple([Axis("dp_replicate", dp_replicate)] * (dp_replicate > 1) + axes))
