"""Which rank am I: the only reader of Slurm's and torchrun's rank variables.

``RANKS`` is the table of names; nothing else in hpcft reads these variables to find its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpcft.errors import refuse
from hpcft.plan.layout import Layout, Place


@dataclass(frozen=True)
class Names:
    """The variables of one launcher: rank, world size, rank inside the node."""

    launcher: str
    rank: str
    world: str
    local: str


# torchrun's names come first: our own per-node starter sets them inside a Slurm task, where Slurm's are the node's.
RANKS = (
    Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    Names("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def place_from_environment(environ: Mapping[str, str], layout: Layout) -> Place:
    """This process's place. Raises Refusal where no launcher's variables are set or they differ from the plan."""
    for names in RANKS:
        if names.rank in environ and names.world in environ:
            break
    else:
        raise refuse(
            "this process was not started as a rank: neither Slurm's nor torchrun's variables are set",
            choices=[names.rank for names in RANKS],
            hint="start it with: hpcft submit",
        )
    world, rank = int(environ[names.world]), int(environ[names.rank])
    if world != layout.world_size:
        raise refuse(
            f"{names.launcher} started {world} ranks, the plan has {layout.world_size} "
            f"({layout.nodes} nodes × {layout.ranks_per_node})",
            where=names.world,
            value=world,
            choices=[layout.world_size],
            hint="submit the script as rendered, or render it anew for this allocation",
        )
    place = layout.place(rank)
    local = int(environ.get(names.local, place.local_rank))
    if local != place.local_rank:
        raise refuse(
            f"rank {rank} is number {local} on its node, the plan has it as number {place.local_rank}",
            where=names.local,
            hint="ranks must be numbered node by node: srun --distribution=block",
        )
    return place
