"""What is foretold of a run, as values of the Plan: the hardware it was reckoned against, bytes, and other ways.

How the numbers come about stands in ``memory`` and ``speed``; nothing that trains reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What memory and time are reckoned against. Bytes: None where not known; bandwidths in GB/s, 10^9 bytes."""

    gpu_bytes: int | None  # of one GPU, that a process can have
    host_bytes: int | None  # of one node
    node_bandwidth: float  # from one GPU to those of its node
    fabric_bandwidth: float  # from one node to the others
    host_bandwidth: float  # from one GPU to the memory of its node


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to spread the same run that was weighed: predicted bytes of a GPU and of a node, seconds a step."""

    strategy: str
    tp: int
    dp_replicate: int
    micro_windows: int
    gpu_bytes: int
    host_bytes: int
    seconds: float | None  # of one optimizer step; None where the GPU's speed is not known
    fits: bool


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted bytes of the fullest GPU, by what they hold, and of a node's own memory; see ``plan/memory.py``.

    reserve: what no tensor holds: the driver's context, and gaps between tensors. options: for strategy auto all ways
    that were weighed, the chosen one first; else the next cheaper one, where there is one. reason: why the first one.
    """

    shape: Shape
    hardware: Hardware
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    communication: int
    reserve: int
    host: int
    options: tuple[Option, ...]
    reason: str

    @property
    def allocated(self) -> int:
        """Bytes that tensors hold at the peak, as torch's allocator counts them."""
        held = (self.weights, self.gradients, self.optimizer, self.gathered, self.activations, self.logits)
        return sum(held)

    @property
    def total(self) -> int:
        """All bytes of the GPU."""
        return self.allocated + self.communication + self.reserve
