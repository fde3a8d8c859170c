"""Fully sharded data parallel (torch's FSDP2): each rank keeps a part of every parameter, its gradient and its moments.

A unit, one decoder layer, the embedding or the head, is gathered just before it computes and freed after, or where the
plan has memory left, after the backward pass; the rest is the root's unit. Sharded parameters are the masters; the
gathered copies have the compute type, and gradients are summed in float32, those of a whole model inside a node by our
own ``reduce_scatter``. GPUs of a node copy layers from each other where they can (``copy_engines``). Where the plan
keeps weights in bfloat16 (``main_params_dtype``), a shard's gradient is rounded after each sum, as its moments are.
With ``dp_replicate`` the shards lie inside a group of ranks and the groups are replicas (HSDP); with ``tp`` each
parameter is first cut for tensor parallelism, which FSDP does not see.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    UnshardHandle,
    fully_shard,
)

from hpcft.catalog import STRATEGIES
from hpcft.plan.memory import trains_head
from hpcft.plan.plan import Plan
from hpcft.plan.weights import GATHERS, SUMS, reads_peers, sends_narrow
from hpcft.run.manifest import PARTS
from hpcft.train import adamw, copy_engines
from hpcft.train.copy_engines import Buffers, CopyingGather
from hpcft.train.norm import global_norm
from hpcft.train.precision import DTYPES, LossScale
from hpcft.train.protocols import ReadShard, Shard
from hpcft.train.reduce_scatter import AllToAllReduceScatter
from hpcft.train.skeleton import Skeleton, layers_of, move_buffers, plain
from hpcft.train.world import World


def build(skeleton: Skeleton, plan: Plan, world: World) -> FullyShardedDataParallel:
    """Shard the empty model, then read only what this rank keeps."""
    offload = bool(STRATEGIES[plan.train.strategy].offload)
    shard(skeleton.model, plan, world, offload)
    materialise(skeleton, torch.device("cpu") if offload else world.device, world)
    return FullyShardedDataParallel(skeleton, plan, world, offload)


def shard(model: Any, plan: Plan, world: World, offload: bool) -> None:
    """One unit per decoder layer, one for the embedding, one for a head that is trained, the rest in the root's.

    In the root's, a head would be waited for before the first layer, and its gradient would be sent after the last one.
    """
    dtype = DTYPES[plan.model.dtype]
    axes = ("dp_replicate", "dp") if plan.layout.degree("dp_replicate") > 1 else ("dp",)
    how: dict[str, Any] = {
        "mesh": world.mesh[axes],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for layer in layers_of(model):
        fully_shard(layer, reshard_after_forward=plan.train.resharding, **how)
    base = plain(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:  # a tied one is needed until the end
        fully_shard(embedding, **how)
        if trains_head(plan) and plan.layout.degree("tp") == 1:  # tensor parallelism has hooks of its own around it
            # Some models cast what goes into it to its weight's type, which is that of the masters outside of it.
            policy = dataclasses.replace(how["mp_policy"], cast_forward_inputs=True)
            fully_shard(head, reshard_after_forward=False, **{**how, "mp_policy": policy})
    fully_shard(model, **how)
    _set_messages(model, plan, world)


def _set_messages(model: Any, plan: Plan, world: World) -> None:
    """How weights and gradients come to their ranks, where that is not how torch sends them."""
    gathers, sums = _shared_buffers(model, plan, world)
    layers: list[Any] = layers_of(model)
    for unit in model.modules() if sends_narrow(plan) else ():
        if isinstance(unit, FSDPModule):
            narrow = AllToAllReduceScatter(DTYPES[plan.model.dtype], sums if unit in layers else None)
            unit.set_custom_reduce_scatter(narrow)  # type: ignore[arg-type]  # a private class
    if gathers is not None:
        for layer in layers:
            layer.set_custom_all_gather(CopyingGather(gathers))


def _shared_buffers(model: Any, plan: Plan, world: World) -> tuple[Buffers | None, Buffers | None]:
    """For the weights and for the gradients of a layer at a time, where ranks can copy them from each other."""
    if not (reads_peers(plan) and copy_engines.linked(plan, world)):
        return None, None
    narrow = DTYPES[plan.model.dtype].itemsize

    def size(p: torch.Tensor) -> int:  # FSDP pads every rank's part to the first one's
        each = narrow if p.is_floating_point() else p.element_size()
        return _part_sizes(p, world)[0] * world.layout.degree("dp") * each

    largest = max(sum(size(p) for p in layer.parameters()) for layer in layers_of(model))
    counts = [GATHERS, SUMS] if sends_narrow(plan) else [GATHERS]
    made = copy_engines.buffers(world, world.group("dp"), largest, counts)
    if isinstance(made, str):
        if world.first:
            print(f"NCCL sends layers, since GPUs do not read each other's memory: {made}", file=sys.stderr)
        return None, None
    return made[0], made[1] if len(made) > 1 else None


@torch.no_grad()
def materialise(skeleton: Skeleton, device: torch.device, world: World) -> None:
    """This rank's shard of every parameter, read from its source."""
    buffers = {(module, key): b for module in skeleton.model.modules() for key, b in module._buffers.items()}
    skeleton.model.to_empty(device=device)
    for (module, key), buffer in buffers.items():
        module._buffers[key] = buffer
    move_buffers(skeleton.model, world.device)
    for name, parameter in skeleton.model.named_parameters():
        local = _local(parameter)
        skeleton.read(name, local, _offset(parameter, world))


def _local(parameter: Any) -> torch.Tensor:
    """The rank's own numbers of a sharded parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _offset(parameter: Any, world: World) -> int:
    """Where they begin in the flattened parameter."""
    return sum(_part_sizes(parameter, world)[: world.place.coordinates.get("dp", 0)])


def _part_sizes(parameter: Any, world: World) -> list[int]:
    """How many numbers of it each rank has: FSDP2 cuts the first dimension as torch.chunk does."""
    rows, ranks = parameter.shape[0], world.layout.degree("dp")
    chunk, each = -(-rows // ranks), parameter.numel() // max(rows, 1)
    return [(min((rank + 1) * chunk, rows) - min(rank * chunk, rows)) * each for rank in range(ranks)]


class FullyShardedDataParallel:
    """Fulfils ``protocols.Sharded``."""

    def __init__(self, skeleton: Skeleton, plan: Plan, world: World, offload: bool) -> None:
        self.model: Any = skeleton.model
        self.skeleton, self.world, self.offload = skeleton, world, offload
        self.scale = LossScale.for_dtype(DTYPES[plan.model.dtype])
        self.updates = 0
        self.whole = plan.tuner.kind == "full"
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # What AdamW steps on: this rank's parts as plain tensors. Of DTensors it takes the host five times as long.
        self.masters = {name: _local(p).detach() for name, p in self.trained.items()}
        resting = [master for name, master in self.masters.items() if name in skeleton.unread]
        self.optimizer = adamw.build(self.masters.values(), plan.optim, resting)
        self.opening = self._opening_units()
        self.gathering: list[UnshardHandle] = []
        self.tensor_group = world.group("tp") if skeleton.regions else None

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of ``loss``, summed over the ranks: adapters' once a step, a whole model's every time.

        Unsummed gradients of a whole model would lie on every rank in full. Replicas are summed once a step.

        To FSDP every backward pass is its last, and it then lets go of a layer that it fetched and did not need. Kept
        until the next forward pass, it would be taken out of a buffer that other layers have used (``CopyingGather``).
        """
        self.model.set_requires_gradient_sync(last or self.whole)
        self.model.set_requires_all_reduce(last)
        # FSDP averages over the data ranks; ours is a sum.
        (loss * (self.world.data_size * self.scale.value)).backward()

    @torch.no_grad()
    def reduce(self) -> None:
        """Gradients without the loss scale, zeros where a parameter took no part; of what tensor parallelism has not
        cut, their sum over its ranks.
        """
        for name, parameter in self.trained.items():
            master = self.masters[name]
            master.grad = torch.zeros_like(master) if parameter.grad is None else _local(parameter.grad)
        if self.scale.value != 1.0:
            torch._foreach_div_(self._gradients(cut=True) + self._gradients(cut=False), self.scale.value)
        if self.tensor_group is None:
            return
        whole = self._gradients(cut=False)
        flat = torch.cat([g.flatten() for g in whole]).to(self.world.device, torch.float32)
        dist.all_reduce(flat, group=self.tensor_group)
        for gradient, part in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def _gradients(self, cut: bool) -> list[torch.Tensor]:
        """This rank's parts, of parameters that tensor parallelism has cut or of the others."""
        regions = self.skeleton.regions
        return [m.grad for name, m in self.masters.items() if m.grad is not None and (name in regions) is cut]

    def norm(self) -> torch.Tensor:
        """The 2-norm of all gradients; a float32 scalar, the same on every rank."""
        cut, whole = (self._squares(self._gradients(cut)) for cut in (True, False))
        return global_norm(self.world, cut, whole, once="dp_replicate")

    def _squares(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The sum of squares of this rank's parts."""
        parts = [g for g in gradients if g.numel()]
        if not parts:
            return torch.zeros((), device=self.world.device)
        return torch.stack(list(torch._foreach_norm(parts, dtype=torch.float32))).square().sum().to(self.world.device)

    @torch.no_grad()
    def step(self, learning_rate: float, divisor: torch.Tensor, good: torch.Tensor) -> None:
        """Queue one AdamW step on the sharded masters; on the host, where they are offloaded, it is made now."""
        for name, parameter in self.trained.items():
            self.masters[name].data = _local(parameter)  # FSDP may have moved it, to memory that is locked
        self.gathering.clear()
        adamw.step(self.optimizer, learning_rate, divisor, good, done=self._gather_early)

    def _gather_early(self, master: torch.Tensor) -> None:
        """Begin to gather what the next forward pass begins with, which would wait for it, beside the other masters."""
        if (unit := self.opening.get(master)) is not None:
            self.gathering.append(unit.unshard(async_op=True))

    def _opening_units(self) -> dict[torch.Tensor, Any]:
        """The embedding's unit and the first layer's, by the last of its large masters that AdamW steps with.

        One whose parts are large on some ranks only is none of them: all ranks must gather the same, in one order.
        """
        sharded: list[Any] = [unit for unit in self.model.modules() if isinstance(unit, FSDPModule)]
        units = {p: unit for unit in sharded for p in unit.parameters()}  # an inner unit takes them from an outer one
        opening = {units[plain(self.model).get_input_embeddings().weight], layers_of(self.model)[0]}
        owners = {self.masters[name]: units[p] for name, p in self.trained.items()}
        for parameter in self.trained.values():
            if len({part >= adamw.LARGE for part in _part_sizes(parameter, self.world)}) > 1:
                opening.discard(units[parameter])
        every = [master for group in self.optimizer.param_groups for master in group["params"]]
        last = {owners[master]: master for master in every if master.numel() >= adamw.LARGE}
        return {master: unit for unit, master in last.items() if unit in opening}

    def end_step(self, good: bool) -> None:
        """Count the step and empty the gradients."""
        self.updates += good
        for name, parameter in self.trained.items():
            parameter.grad = self.masters[name].grad = None

    def shards(self) -> Iterator[Shard]:
        """This rank's shards; of replicas the first writes, of what is not cut the first tensor rank."""
        if self.world.place.coordinates.get("dp_replicate", 0):
            return
        for name, parameter in self.trained.items():
            region = self.skeleton.regions.get(name)
            if region is None and not self.world.speaks:
                continue
            for part in PARTS:
                beside = None if part == "master" else adamw.part_of(self.optimizer, self.masters[name], part)
                local = _local(parameter) if beside is None else beside
                if local.numel():
                    shape, offset = self.skeleton.shapes[name], _offset(parameter, self.world)
                    yield Shard(name, part, shape, offset, local.flatten(), region)

    @torch.no_grad()
    def load(self, read: ReadShard, updates: int) -> None:
        """Fill the shards of masters and moments."""
        self.updates = updates
        for handle in self.gathering:
            handle.wait()
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # a forward pass without a backward pass has left its weights gathered
        for name, parameter in self.trained.items():
            local = _local(parameter)
            moments = {part: torch.zeros_like(local) for part in adamw.MOMENTS} if updates else {}
            for part, into in {"master": local, **moments}.items():
                if into.numel():
                    at, region = _offset(parameter, self.world), self.skeleton.regions.get(name)
                    into.copy_(read(name, part, at, into.numel(), region).view(into.shape))
            adamw.set_moments(self.optimizer, self.masters[name], moments, updates)
