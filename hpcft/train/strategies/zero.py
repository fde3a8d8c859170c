"""DeepSpeed's ZeRO: optimizer states (1), gradients (2) and weights (3) in parts over the data ranks; offload.

The engine trains; what is saved and read is ours. Its float32 partitions are flat buffers in which each parameter has a
stretch; ``_pieces`` finds those, so that checkpoints have the form that every other strategy reads and writes.
Accumulation, clipping and the loss scale are told explicitly: an absent value is not none for DeepSpeed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcft.catalog import STRATEGIES
from hpcft.plan.memory import ZERO_BUCKET
from hpcft.plan.plan import Plan
from hpcft.run.manifest import PARTS
from hpcft.train.adamw import MOMENTS, count, groups, set_rate, settings
from hpcft.train.precision import DTYPES, LossScale
from hpcft.train.protocols import ReadShard, Shard
from hpcft.train.skeleton import Skeleton, layers_of, move_buffers
from hpcft.train.world import World


def build(skeleton: Skeleton, plan: Plan, world: World) -> Zero:
    """Weights onto the device, for stage 3 layer by layer into their partitions, and the engine around them."""
    import deepspeed

    # DeepSpeed takes its device from here, and srun sets no such variable; a rank that sees one GPU drives number 0.
    os.environ["LOCAL_RANK"] = str(world.place.local_rank if world.device.index is None else world.device.index)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":  # it would compile messages through shared memory first; gloo carries them too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = engine_config(plan, sum(map(math.prod, skeleton.trained.values())))
    if stage(plan) == 3:
        _fill_in_parts(skeleton, config, DTYPES[plan.model.dtype], world)
    else:
        # In the type that is computed in: the engine would cast a float32 copy of the whole model on the GPU.
        move_buffers(skeleton.model, world.device)
        skeleton.fill_part(skeleton.model, world.device, DTYPES[plan.model.dtype])
    trained = [parameter for parameter in skeleton.model.parameters() if parameter.requires_grad]
    resting = [parameter for name, parameter in skeleton.model.named_parameters() if name in skeleton.unread]
    engine, *_ = deepspeed.initialize(
        model=skeleton.model,
        optimizer=_optimizer(trained, resting, plan),
        config=config,
        dist_init_required=False,
    )
    return Zero(skeleton, plan, world, engine)


def stage(plan: Plan) -> int:
    """1, 2 or 3: how many of optimizer states, gradients and weights are in parts."""
    return len(STRATEGIES[plan.train.strategy].shards)


def engine_config(plan: Plan, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's file beneath, ours on top. trained: numbers that are trained."""
    # In bfloat16, stage 1 would add up the micro batches' gradients in bfloat16; stage 2 does it in float32.
    zero: dict[str, Any] = {"stage": max(stage(plan), 2) if plan.model.dtype == "bfloat16" else stage(plan)}
    pinned = {"device": "cpu", "pin_memory": plan.resources.accelerator != "cpu"}
    for what in STRATEGIES[plan.train.strategy].offload:
        zero["offload_optimizer" if what == "optimizer" else "offload_param"] = pinned
    ours = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": plan.batch.micro_windows,
        "gradient_accumulation_steps": 1,  # the loop counts; it tells the engine which backward pass is the last
        "gradient_clipping": plan.optim.max_grad_norm,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": plan.model.dtype == "bfloat16"},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # torch's is as fast on the host and needs no compiler there
        "steps_per_print": 2**31,
    }
    theirs = json.loads(plan.train.deepspeed or "{}")
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # a buffer of this many numbers is really made
        zero[bucket] = min(trained, theirs.get("zero_optimization", {}).get(bucket, ZERO_BUCKET))
    return _over(ours, theirs)


def _over(ours: Any, theirs: Any) -> Any:
    """``ours`` laid over ``theirs``, map by map."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours
    return {**theirs, **{key: _over(value, theirs.get(key)) for key, value in ours.items()}}


def _optimizer(trained: list[torch.nn.Parameter], resting: list[torch.nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(trained, plan.optim, _matrix, resting), **settings(plan.optim), fused=True)


def _matrix(parameter: Any) -> bool:
    """Does it decay? Stage 3 has taken its shape away and remembers it."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def _fill_in_parts(skeleton: Skeleton, config: Mapping[str, Any], dtype: torch.dtype, world: World) -> None:
    """Stage 3: one layer whole at a time; the rest of the model last."""
    import deepspeed
    from deepspeed.runtime.zero import stage3

    stage3.defragment = _flattened
    move_buffers(skeleton.model, world.device)
    for part in (*layers_of(skeleton.model), skeleton.model):
        skeleton.fill_part(part, world.device, dtype)
        deepspeed.zero.Init(module=part, config_dict_or_path=dict(config), mem_efficient_linear=False, dtype=dtype)


def _flattened(partitions: list[torch.Tensor]) -> torch.Tensor:
    """They in one buffer, into which each is moved. DeepSpeed's own goes by way of the host's memory, which holds the
    whole model then; on the device there is room: masters and gradients come later.
    """
    whole = torch.empty(sum(p.numel() for p in partitions), dtype=partitions[0].dtype, device=partitions[0].device)
    for partition, into in zip(partitions, whole.split([p.numel() for p in partitions]), strict=True):
        partition.data = into.copy_(partition.flatten()).view(partition.shape)
    return whole


@dataclass(frozen=True)
class Piece:
    """A stretch of a float32 partition. flat: the partition; at: where in it; offset: where in the parameter."""

    name: str
    flat: torch.Tensor
    at: int
    offset: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same stretch of a tensor that lies beside ``flat``."""
        return tensor.narrow(0, self.at, self.length)


class Zero:
    """Fulfils ``protocols.Sharded``."""

    def __init__(self, skeleton: Skeleton, plan: Plan, world: World, engine: Any) -> None:
        self.skeleton, self.world, self.engine, self.stage = skeleton, world, engine, stage(plan)
        self.model = engine
        self.scale = LossScale()
        self.updates = 0
        self.zero: Any = engine.optimizer
        names = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
        self.trained: dict[str, Any] = {names[id(p)]: p for p in skeleton.model.parameters() if p.requires_grad}
        self.pieces = list(self._pieces())
        if plan.model.dtype != "float32":
            self._start_exactly()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of ``loss``; DeepSpeed averages over the ranks, ours is a sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.data_size)

    def reduce(self) -> None:
        """Done by the engine during the last backward pass."""

    def norm(self) -> torch.Tensor:
        """The 2-norm of all gradients; what the engine calls invalid, -1, is NaN here."""
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self.zero._get_norm_groups())
        else:
            norm = self.zero.scaled_global_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)
        return torch.where(norm < 0, torch.nan, norm)

    def step(self, learning_rate: float, divisor: torch.Tensor, good: torch.Tensor) -> None:
        """Nothing but the rate: the engine clips and steps at once, and must be told by the host whether to."""
        set_rate(self.zero.optimizer, learning_rate)

    def end_step(self, good: bool) -> None:
        """One AdamW step on the float32 partitions, after which the working weights follow, or none."""
        if good:
            self.engine.step()
            self.updates += 1
        else:
            self._discard()

    def _discard(self) -> None:
        """Empty the gradients, as the engine does after an overflow."""
        if self.stage == 3:
            self.zero._overflow_clean_up(1.0)
            return
        self.zero.zero_grad(set_to_none=True)
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()
        for key in self.zero.averaged_gradients:
            self.zero.averaged_gradients[key] = None
            self.zero.all_grad_tensors[key] = None

    def _pieces(self) -> Iterator[Piece]:
        """What this rank holds of each trained parameter."""
        for name, parameter in self.trained.items():
            if self.stage == 3:
                group, at, held = self.zero.grad_position[self.zero.get_param_id(parameter)]
                offset = self.world.rank * held
                length = min(held, max(0, parameter.ds_numel - offset))
                flat = self.zero.fp32_partitioned_groups_flat[group]
            elif parameter._hp_mapping is None:
                continue
            else:
                mapping = parameter._hp_mapping
                at, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                offset = mapping.lp_fragment_address.start
                flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            if length:
                yield Piece(name, flat, at, offset, length)

    def shards(self) -> Iterator[Shard]:
        """This rank's stretches of masters and moments."""
        for piece in self.pieces:
            state = self.zero.optimizer.state.get(piece.flat) or {}
            for part in PARTS:
                beside = piece.flat if part == "master" else state.get(part)
                tensor = torch.zeros(piece.length) if beside is None else piece.of(beside.data).float()
                yield Shard(piece.name, part, self.skeleton.shapes[piece.name], piece.offset, tensor)

    @torch.no_grad()
    def load(self, read: ReadShard, updates: int) -> None:
        """Fill masters and moments; the working weights follow."""
        self.updates = updates
        if self.stage == 3:
            self.engine.empty_partition_cache()  # what a forward pass without a backward pass has left gathered
        for flat in {id(piece.flat): piece.flat for piece in self.pieces}.values() if updates else ():
            moments = {part: torch.zeros_like(flat.data) for part in MOMENTS}
            self.zero.optimizer.state[flat] = {**moments, "step": count(updates, flat.device)}
        for piece in self.pieces:
            for part in PARTS if updates else PARTS[:1]:
                beside = piece.flat if part == "master" else self.zero.optimizer.state[piece.flat][part]
                piece.of(beside.data).copy_(read(piece.name, part, piece.offset, piece.length))
        self._refresh()

    def _refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @torch.no_grad()
    def _start_exactly(self) -> None:
        """DeepSpeed's first masters come from weights that were rounded; ours start as they were read."""
        mine = {piece.name: piece for piece in self.pieces}
        for name in self.trained:  # every name on every rank, since a source may be read by all together only
            piece = mine.get(name)
            numbers = torch.empty(piece.length if piece else 0)
            self.skeleton.read(name, numbers, piece.offset if piece else 0)
            if piece:
                piece.of(piece.flat.data).copy_(numbers)
        self._refresh()
