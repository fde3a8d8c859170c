"""Data parallel: every rank holds the whole model, gradients are summed in float32 over fixed buckets.

torch's own DDP rebuilds its buckets after the first backward pass, which changes the order of summation, so a resumed
run would differ from an undisturbed one. Here the buckets follow from the parameter list alone. Each is a few flat
float32 buffers (gradient, master); its sum over the ranks starts as soon as its last gradient is there, while the
backward pass goes on, or after it where all sums are short, and always in the same order on all ranks. Frozen weights
cost nothing. One rank alone sums nothing over ranks: gradients that have their masters' type stay where the backward
pass made them.

Where the plan keeps weights in bfloat16 (``main_params_dtype``), a master is the parameter itself, and gradients are of
its type too, since torch's fused AdamW knows one type only: each sum, over micro batches and over ranks, is rounded to
eight bits. float32 sums would cost half as much memory again, and be rounded before the step all the same.

With tensor parallelism each rank holds its cut of the model, and two kinds of buckets exist: what is cut is summed over
the data ranks, what is not over all ranks (``tensor_parallel`` says why).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from hpcft.plan.plan import Plan
from hpcft.run.manifest import PARTS
from hpcft.run.regions import Region
from hpcft.train import adamw
from hpcft.train.model import check_same
from hpcft.train.norm import global_norm
from hpcft.train.precision import DTYPES, LossScale
from hpcft.train.protocols import ReadShard, Shard
from hpcft.train.skeleton import Skeleton
from hpcft.train.world import World

# Sums that take so few seconds are made after the backward pass: a message beside it holds some of the GPU's processors
# until the last rank sends its own, and a matrix product that finds one of them taken lasts twice as long.
SHORT = 1.5e-3
BUCKET_BYTES = 25 * 2**20  # of gradients at most: enough to keep the network busy
WIDENED = 2**22  # numbers made float32 at a time on their way to a sum: they stay in a GPU's cache
Types = tuple[torch.dtype, torch.dtype]  # of masters and gradients; of what is computed with
BUCKETS = 8  # what a small model is cut into, down to a megabyte each: with one bucket nothing would overlap


@dataclass
class Slot:
    """One trainable parameter inside its bucket: ``master`` and ``grad`` are views of the bucket's buffers.

    shape: of the whole parameter; region: what of it is here, None for all. fresh: ``grad`` is an earlier step's, and
    this one's first gradient takes its place. grad is None between steps where there is no buffer for it.
    """

    name: str
    parameter: nn.Parameter
    master: torch.Tensor
    grad: torch.Tensor | None
    shape: tuple[int, ...]
    region: Region | None
    fresh: bool = True

    @torch.no_grad()
    def add(self, gradient: torch.Tensor, scale: float) -> None:
        """In the bucket's type and without the loss scale. Copies of lists, and sums of one type, run at the memory's
        speed; a sum of two types takes three times as long.
        """
        if self.grad is None:
            self.grad = gradient if scale == 1.0 else gradient.mul_(1.0 / scale)
        elif self.fresh:
            torch._foreach_copy_([self.grad], [gradient])
            if scale != 1.0:
                self.grad.mul_(1.0 / scale)
        elif gradient.dtype is self.grad.dtype or not gradient.is_contiguous():
            self.grad.add_(gradient, alpha=1.0 / scale)
        else:
            wide = torch.empty(min(WIDENED, gradient.numel()), dtype=torch.float32, device=gradient.device)
            for into, part in zip(self.grad.view(-1).split(WIDENED), gradient.view(-1).split(WIDENED), strict=True):
                torch._foreach_copy_([wide[: part.numel()]], [part])
                into.add_(wide[: part.numel()], alpha=1.0 / scale)
        self.fresh = False


@dataclass
class Bucket:
    """Some parameters that are reduced together. waiting: how many gradients are still to come in this pass.

    group: the ranks of the sum, None for all. cut: these are tensor-parallel parts.
    """

    grad: torch.Tensor | None
    group: dist.ProcessGroup | None = None
    cut: bool = False
    slots: list[Slot] = field(default_factory=list)
    waiting: int = 0
    work: dist.Work | None = None
    launched: bool = False


def build(skeleton: Skeleton, plan: Plan, world: World) -> DataParallel:
    """The whole model, or its tensor-parallel cut, on every rank; what is trained becomes copies of its masters."""
    skeleton.fill(world.device)
    if not skeleton.regions:
        check_same(skeleton.model, world)
    return DataParallel(skeleton, plan, world)


class DataParallel:
    """Fulfils ``protocols.Sharded``."""

    def __init__(self, skeleton: Skeleton, plan: Plan, world: World) -> None:
        self.model = skeleton.model
        self.skeleton = skeleton
        self.world = world
        self.tensor_group = world.group("tp") if skeleton.regions else None
        self.dtype = DTYPES[plan.model.dtype]
        self.scale = LossScale.for_dtype(self.dtype)
        self.updates = 0
        types = DTYPES[plan.model.main_params_dtype], self.dtype
        self.apart = world.size == 1 and types[0] is types[1]  # gradients lie where they were made
        self.buckets = _buckets(skeleton, types, world.group("dp") if skeleton.regions else None, self.apart)
        self.slots = {slot.name: slot for bucket in self.buckets for slot in bucket.slots}
        # Of the compute type; where the masters have that too, they are what is computed with.
        self.copies = {slot.master: slot.parameter for slot in self.slots.values() if types[0] is not types[1]}
        resting = [slot.master for slot in self.slots.values() if slot.name in skeleton.unread]
        self.optimizer = adamw.build([slot.master for slot in self.slots.values()], plan.optim, resting)
        self._last = False
        self.overlaps = _overlaps(plan, self.buckets)
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
        """A gradient is there: into its bucket, without the loss scale."""
        assert parameter.grad is not None
        slot.add(parameter.grad, self.scale.value)
        parameter.grad = None
        bucket.waiting -= 1
        if self._last and bucket.waiting == 0 and self.overlaps:
            self._launch(whole_only=True)

    def _launch(self, whole_only: bool) -> None:
        """Start the sums in the order of buckets: collectives must be the same sequence on every rank."""
        for bucket in self.buckets:
            if bucket.launched:
                continue
            if whole_only and bucket.waiting > 0:
                return
            bucket.work = dist.all_reduce(bucket.grad, group=bucket.group, async_op=True)
            bucket.launched = True

    def reduce(self) -> None:
        """Finish the sums; where no gradient came in this step, zeros are added."""
        for slot in self.slots.values():
            if slot.grad is None:
                slot.grad = torch.zeros_like(slot.master)
            elif slot.fresh:
                slot.grad.zero_()
            slot.master.grad = slot.grad
        if self.world.size > 1:
            self._launch(whole_only=False)
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.work, bucket.launched = None, False
        self._last = False

    def norm(self) -> torch.Tensor:
        """The 2-norm of all gradients; a float32 scalar on the device, nothing waits for it."""
        if self.tensor_group is not None:
            return self._norm_of_parts()
        return torch.linalg.vector_norm(_norms(self.buckets))

    def _norm_of_parts(self) -> torch.Tensor:
        def squares(cut: bool) -> torch.Tensor:
            found = [bucket for bucket in self.buckets if bucket.cut is cut]
            return _norms(found).square().sum() if found else torch.zeros((), device=self.world.device)

        return global_norm(self.world, squares(True), squares(False), once="dp")

    def step(self, learning_rate: float, divisor: torch.Tensor, good: torch.Tensor) -> None:
        """Queue one AdamW step on the masters; the working copies follow."""
        adamw.step(self.optimizer, learning_rate, divisor, good, self.copies)

    def end_step(self, good: bool) -> None:
        """Count the step; the next gradients take the place of these."""
        self.updates += good
        for slot in self.slots.values():
            slot.fresh = True
            if self.apart:
                slot.grad = slot.master.grad = None

    def shards(self) -> Iterator[Shard]:
        """The rank's even share of the whole state laid end to end, so that saving is spread over the ranks."""
        slots = [slot for slot in self.slots.values() if slot.region or self.world.speaks]
        total = sum(slot.master.numel() for slot in slots) * len(PARTS)
        start, end = (total * r // self.world.data_size for r in (self.world.data_rank, self.world.data_rank + 1))
        at = 0
        for slot in slots:
            for part in PARTS:
                size = slot.master.numel()
                first, last = max(start - at, 0), min(end - at, size)
                if first < last:
                    piece = adamw.part_of(self.optimizer, slot.master, part).flatten()[first:last]
                    yield Shard(slot.name, part, slot.shape, first, piece, slot.region)
                at += size

    @torch.no_grad()
    def load(self, read: ReadShard, updates: int) -> None:
        """Fill masters and moments; every rank reads all that it holds."""
        self.updates = updates
        for slot in self.slots.values():
            size, shape = slot.master.numel(), slot.master.shape
            slot.master.copy_(read(slot.name, "master", 0, size, slot.region).view(shape))
            moments = {}
            for part in adamw.MOMENTS if updates else ():
                moments[part] = torch.empty_like(slot.master)
                moments[part].copy_(read(slot.name, part, 0, size, slot.region).view(shape))
            adamw.set_moments(self.optimizer, slot.master, moments, updates)
        adamw.follow(self.copies)


def _overlaps(plan: Plan, buckets: Iterable[Bucket]) -> bool:
    """Are sums over the ranks worth starting before the backward pass ends?"""
    if plan.memory is None or plan.layout.nodes > 1:  # links are not known, or slow
        return True
    sent = sum(bucket.grad.nbytes for bucket in buckets if bucket.grad is not None)
    return 2 * sent / (plan.memory.hardware.node_bandwidth * 1e9) > SHORT


def _norms(buckets: Iterable[Bucket]) -> torch.Tensor:
    """Of the gradients as they lie; float32, whatever their type: in bfloat16 they would have three digits."""
    lying = [g for b in buckets for g in ([slot.grad for slot in b.slots] if b.grad is None else [b.grad])]
    return torch.stack(list(torch._foreach_norm([g for g in lying if g is not None], dtype=torch.float32)))


def _buckets(skeleton: Skeleton, types: Types, group: dist.ProcessGroup | None, apart: bool) -> list[Bucket]:
    """Trainable parameters in reverse order (about the order in which their gradients come), cut by size."""
    each = types[0].itemsize
    trained = [(name, parameter) for name, parameter in skeleton.model.named_parameters() if parameter.requires_grad]
    bucket_bytes = min(BUCKET_BYTES, max(2**20, sum(p.numel() for _, p in trained) * each // BUCKETS))
    groups: list[list[tuple[str, nn.Parameter]]] = []
    open_group: dict[bool, list[tuple[str, nn.Parameter]]] = {}
    room: dict[bool, int] = {}
    for name, parameter in reversed(trained):
        cut = name in skeleton.regions
        if cut not in open_group or parameter.numel() * each > room[cut]:
            open_group[cut] = []
            groups.append(open_group[cut])
            room[cut] = bucket_bytes
        open_group[cut].append((name, parameter))
        room[cut] -= parameter.numel() * each
    return [_bucket(skeleton, parameters, types, group, apart) for parameters in groups]


@torch.no_grad()
def _bucket(
    skeleton: Skeleton,
    parameters: list[tuple[str, nn.Parameter]],
    types: Types,
    group: dist.ProcessGroup | None,
    apart: bool,
) -> Bucket:
    """Buffers for some parameters: of their masters, and of their gradients unless those lie apart."""
    kept, computed = types
    device, size = parameters[0][1].device, sum(p.numel() for _, p in parameters)
    masters = torch.zeros(size, dtype=kept, device=device)
    grads = None if apart else torch.zeros_like(masters)
    cut = parameters[0][0] in skeleton.regions
    bucket, at = Bucket(grads, group if cut else None, cut), 0
    for name, parameter in parameters:
        stretch = slice(at, at + parameter.numel())
        master = masters[stretch].view(parameter.shape)
        grad = None if grads is None else grads[stretch].view(parameter.shape)
        master.copy_(parameter)
        parameter.data = master if computed is kept else parameter.data.to(computed)
        bucket.slots.append(Slot(name, parameter, master, grad, skeleton.shapes[name], skeleton.regions.get(name)))
        at += parameter.numel()
    return bucket
