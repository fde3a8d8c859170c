"""One loss on every strategy: the same three optimizer steps on several layouts, and how far apart they come out.

``tests/train/equivalence.py`` makes the table of the docs with this, ``verify`` one of the user's own nodes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.catalog import OBJECTIVES, STRATEGIES
from hpcft.plan.layout import Axis, Layout
from hpcft.plan.plan import BatchPlan, Plan
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop
from hpcft.train.metrics import read_metrics
from hpcft.train.signals import Signals
from hpcft.train.world import World

STEPS = 3
AT_ONCE = 2  # micro batches of a rank in a step, where it has as many windows
Curve = list[list[float]]  # of each step: loss, gradient norm

# Largest relative difference of a loss or norm. bfloat16 has three digits, and each strategy rounds elsewhere.
TOLERANCES: dict[tuple[str, str], float] = {
    ("cpu", "float32"): 1e-5,
    ("cuda", "float32"): 1e-4,
    ("cpu", "bfloat16"): 5e-2,
    ("cuda", "bfloat16"): 5e-2,
}
# By default DeepSpeed leaves small weights whole on every rank, and a small model has no others.
_ALL_IN_PARTS = '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'


@dataclass(frozen=True)
class Case:
    """A strategy and the degrees of its axes, outermost first."""

    name: str
    strategy: str
    degrees: Mapping[str, int]

    @property
    def axes(self) -> str:
        """In words: ``dp 2 × tp 2``."""
        return " × ".join(f"{name} {degree}" for name, degree in self.degrees.items())

    def layout(self, nodes: int, ranks_per_node: int) -> Layout:
        return Layout(nodes, ranks_per_node, tuple(Axis(*axis) for axis in self.degrees.items()))


ALONE = Case("one process", "ddp", {"dp": 1})


def cases(layout: Layout, heads: int) -> list[Case]:
    """What the ranks of ``layout`` can be arranged to; heads: of keys in the model, which tensor ranks must divide."""
    ranks, on_node = layout.world_size, layout.ranks_per_node
    found = [Case("DDP", "ddp", {"dp": ranks})]
    found += [Case(f"ZeRO-{stage}", f"zero{stage}", {"dp": ranks}) for stage in (1, 2, 3)]
    found += [Case("FSDP2", "fsdp", {"dp": ranks})]
    if replicas := _replicas(layout):
        found.append(Case("HSDP", "fsdp", {"dp_replicate": replicas, "dp": ranks // replicas}))
    if layout.nodes == 1 and heads % ranks == 0:
        found.append(Case("TP", "ddp", {"dp": 1, "tp": ranks}))
    if on_node % 2 == 0 and heads % 2 == 0 and ranks > 2:
        found.append(Case("FSDP2×TP", "fsdp", {"dp": ranks // 2, "tp": 2}))
        found.append(Case("DDP×TP", "ddp", {"dp": ranks // 2, "tp": 2}))
    return found


def _replicas(layout: Layout) -> int:
    """Groups that hold a whole model each: the nodes, or the halves of a node; 0 where a group would be one rank."""
    groups = layout.nodes if layout.nodes > 1 else 2
    return groups if layout.world_size % groups == 0 and layout.world_size // groups > 1 else 0


def windows_of_a_step(layout: Layout) -> int:
    """Global batch: eight windows or some more, the same even number for each rank."""
    ranks = layout.world_size
    return 2 * ranks * -(-4 // ranks)


def windows_in_all(batch: int) -> int:
    """Two whole steps, and one of three quarters."""
    return 2 * batch + batch * 3 // 4


def case_plan(plan: Plan, case: Case, model: Path, kind: str, layout: Layout, batch: int) -> Plan:
    """``plan`` on ``case``: the model in ``model``, three steps of ``batch`` windows, packed or not.

    kind: full or lora. layout: the case's own, or one rank's.
    """
    share = batch // layout.data_parallel
    sections: dict[str, dict[str, Any]] = {
        "model": {
            **{"path": str(model), "source": "local", "revision": None, "from_scratch": False, "attention": "auto"},
            **{"trust_remote_code": False, "quantization": "none", "main_params_dtype": "float32"},
        },
        "tuner": {
            **{"kind": kind, "rank": 8, "alpha": 32.0, "dropout": 0.0, "target_modules": ("all-linear",)},
            **{"modules_to_save": (), "bias": "none", "use_dora": False, "init_lora_weights": "true"},
        },
        "optim": {
            **{"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "warmup_ratio": 0.0},
            **{"max_steps": STEPS, "max_grad_norm": 1.0, "weight_decay": 0.1},
        },
        "objective": {"reference": "none"},
        "train": {
            **{"objective": "sft", "objective_module": OBJECTIVES["sft"].module},
            **{"strategy": case.strategy, "strategy_module": STRATEGIES[case.strategy].module},
            **{"deepspeed": _ALL_IN_PARTS if case.strategy.startswith("zero3") else "", "nonfinite": "stop"},
            **{"compiled": False},  # of a miniature, for minutes of compiling
            **{"logging_steps": 1, "eval_steps": -1, "early_stopping_patience": 0, "dataloader_workers": 0},
        },
        "checkpoint": {"save_steps": 0, "load_best_at_end": False, "resume": "auto"},
    }
    changed = {name: dataclasses.replace(getattr(plan, name), **values) for name, values in sections.items()}
    counts = BatchPlan(
        global_windows=batch, micro_windows=max(1, share // AT_ONCE), accumulation=AT_ONCE, eval_windows=1
    )
    return dataclasses.replace(plan, **changed, layout=layout, batch=counts)


def train(plan: Plan, root: Path, here: World, prepared: Any) -> Curve:
    """The run of ``plan`` from where it stands to its end, on every rank of ``here``; rank 0 has its curve."""
    run = assemble.assemble(plan, RunPaths(root), here, Signals(), os.environ, prepared=prepared)
    loop.train(run)
    here.barrier()
    run.metrics.close()
    return curve(root) if here.first else []


def curve(root: Path) -> Curve:
    """Loss and gradient norm of every step that the run has taken."""
    return [[line["loss"], line["grad_norm"]] for line in read_metrics(RunPaths(root).metrics) if "loss" in line]


def difference(one: Curve, other: Curve) -> float:
    """The largest relative difference of losses and norms. Raises ValueError where one has other steps, or none."""
    if not other or len(one) != len(other):
        raise ValueError(f"{len(one)} steps against {len(other)}")
    return max(_relative(one, other))


def _relative(one: Curve, other: Curve) -> Iterator[float]:
    for found, wanted in zip(one, other, strict=True):
        yield from (abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
