"""Data parallel: every rank holds the whole model, gradients are summed in float32 over fixed buckets.

torch's own DDP rebuilds its buckets after the first backward pass, which changes the order of summation, so a resumed
run would differ from an undisturbed one. Here the buckets follow from the parameter list alone. Each is a few flat
float32 buffers (gradient, master); its sum over the ranks starts as soon as its last gradient is there, while the
backward pass goes on, and always in the same order on all ranks. Frozen weights cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from hpcft.plan.plan import OptimPlan, Plan
from hpcft.run.manifest import PARTS
from hpcft.train.precision import DTYPES, LossScale
from hpcft.train.protocols import ReadShard, Shard
from hpcft.train.world import World

BUCKET_BYTES = 25 * 2**20  # of float32 gradients at most: enough to keep the network busy
BUCKETS = 8  # what a small model is cut into, down to a megabyte each: with one bucket nothing would overlap


@dataclass
class Slot:
    """One trainable parameter inside its bucket: ``master`` and ``grad`` are float32 views of the bucket's buffers."""

    name: str
    parameter: nn.Parameter
    master: torch.Tensor
    grad: torch.Tensor


@dataclass
class Bucket:
    """Some parameters that are reduced together. waiting: how many gradients are still to come in this pass."""

    grad: torch.Tensor
    slots: list[Slot] = field(default_factory=list)
    waiting: int = 0
    work: dist.Work | None = None
    launched: bool = False


def build(model: nn.Module, plan: Plan, world: World) -> DataParallel:
    """Spread ``model`` over the ranks of ``world``; its trainable parameters become copies of float32 masters."""
    return DataParallel(model, plan, world)


class DataParallel:
    """Fulfils ``protocols.Sharded``."""

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        self.model = model
        self.world = world
        self.dtype = DTYPES[plan.model.dtype]
        self.scale = LossScale.for_dtype(self.dtype)
        self.updates = 0
        self.buckets = _buckets(model, self.dtype)
        self.slots = {slot.name: slot for bucket in self.buckets for slot in bucket.slots}
        self.optimizer = _adamw(list(self.slots.values()), plan.optim, world.device)
        self._last = False
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(partial(self._collect, bucket, slot))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of ``loss``; during the last backward pass of a step the buckets are summed over ranks."""
        self._last = last and self.world.size > 1
        for bucket in self.buckets:
            bucket.waiting = len(bucket.slots)
        (loss * self.scale.value).backward()

    def _collect(self, bucket: Bucket, slot: Slot, parameter: nn.Parameter) -> None:
        """A gradient is there: into its bucket, in float32 and without the loss scale."""
        assert parameter.grad is not None
        slot.grad.add_(parameter.grad, alpha=1.0 / self.scale.value)
        parameter.grad = None
        bucket.waiting -= 1
        if self._last and bucket.waiting == 0:
            self._launch(whole_only=True)

    def _launch(self, whole_only: bool) -> None:
        """Start the sums in the order of buckets: collectives must be the same sequence on every rank."""
        for bucket in self.buckets:
            if bucket.launched:
                continue
            if whole_only and bucket.waiting > 0:
                return
            bucket.work = dist.all_reduce(bucket.grad, async_op=True)
            bucket.launched = True

    def reduce(self) -> None:
        """Finish the sums; a rank that had no window in this step adds zeros."""
        if self.world.size > 1:
            self._launch(whole_only=False)
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.work, bucket.launched = None, False
        self._last = False

    def clip(self, max_norm: float) -> torch.Tensor:
        """The 2-norm of all gradients, before clipping; a float32 scalar on the device, nothing waits for it."""
        norms = [torch.linalg.vector_norm(bucket.grad) for bucket in self.buckets]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm > 0:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for bucket in self.buckets:
                bucket.grad.mul_(factor)
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW step on the masters; the working copies follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.updates += 1
        self._refresh()
        self.discard()

    def discard(self) -> None:
        """Empty the gradients."""
        for bucket in self.buckets:
            bucket.grad.zero_()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Working copies of the compute type from the masters; in float32 they are the same memory."""
        for slot in self.slots.values():
            if slot.parameter.data_ptr() != slot.master.data_ptr():
                slot.parameter.copy_(slot.master)

    def shards(self) -> Iterator[Shard]:
        """The rank's even share of the whole state laid end to end, so that saving is spread over the ranks."""
        total = sum(slot.master.numel() for slot in self.slots.values()) * len(PARTS)
        start, end = (total * r // self.world.size for r in (self.world.rank, self.world.rank + 1))
        at = 0
        for slot in self.slots.values():
            for part in PARTS:
                size = slot.master.numel()
                first, last = max(start - at, 0), min(end - at, size)
                if first < last:
                    piece = self._part(slot, part).flatten()[first:last]
                    yield Shard(slot.name, part, tuple(slot.master.shape), first, piece)
                at += size

    def _part(self, slot: Slot, part: str) -> torch.Tensor:
        if part == "master":
            return slot.master
        state = self.optimizer.state.get(slot.master)
        return state[part] if state else torch.zeros_like(slot.master)

    @torch.no_grad()
    def load(self, read: ReadShard, updates: int) -> None:
        """Fill masters and moments; every rank reads everything."""
        self.updates = updates
        for slot in self.slots.values():
            size, shape = slot.master.numel(), slot.master.shape
            slot.master.copy_(read(slot.name, "master", 0, size).view(shape))
            # A state that AdamW has not made yet is left for it to make: its moments are zero.
            if updates:
                state = {part: torch.empty_like(slot.master) for part in PARTS[1:]}
                for part, tensor in state.items():
                    tensor.copy_(read(slot.name, part, 0, size).view(shape))
                self.optimizer.state[slot.master] = {**state, "step": self._count(updates)}
        self._refresh()

    def _count(self, updates: int) -> torch.Tensor:
        """AdamW counts in a tensor; its fused form wants it on the device."""
        on_device = self.optimizer.defaults.get("fused")
        return torch.tensor(float(updates), device=self.world.device if on_device else "cpu")


def _buckets(model: nn.Module, dtype: torch.dtype) -> list[Bucket]:
    """Trainable parameters in reverse order (about the order in which their gradients come), cut by size."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    bucket_bytes = min(BUCKET_BYTES, max(2**20, sum(p.numel() for _, p in trained) * 4 // BUCKETS))
    groups: list[list[tuple[str, nn.Parameter]]] = []
    room = 0
    for name, parameter in reversed(trained):
        if not groups or parameter.numel() * 4 > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append((name, parameter))
        room -= parameter.numel() * 4
    return [_bucket(group, dtype) for group in groups]


@torch.no_grad()
def _bucket(group: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> Bucket:
    device, size = group[0][1].device, sum(p.numel() for _, p in group)
    masters, grads = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
    bucket, at = Bucket(grads), 0
    for name, parameter in group:
        master, grad = (flat[at : at + parameter.numel()].view(parameter.shape) for flat in (masters, grads))
        master.copy_(parameter)
        master.grad = grad
        parameter.data = master if dtype is torch.float32 else parameter.data.to(dtype)
        bucket.slots.append(Slot(name, parameter, master, grad))
        at += parameter.numel()
    return bucket


def _adamw(slots: list[Slot], optim: OptimPlan, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) on the masters; only matrices decay, biases and norms do not."""
    groups = [
        {"params": [s.master for s in slots if s.master.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [s.master for s in slots if s.master.dim() < 2], "weight_decay": 0.0},
    ]
    how = {"fused": True} if device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        **how,
    )
