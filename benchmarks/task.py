"""What the ranks of one contestant are given: a file in their folder, beside the Plan that both sides train by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import device
from benchmarks.cases import EVERY, Case
from benchmarks.made import Windows
from benchmarks.numbers import COMPARED
from benchmarks.stopwatch import Limits
from hpcft.plan.plan import Plan

PROFILED = 3  # steps under the profiler, after the timed ones
RESULT, PLAN, TASK = "result.json", "plan.json", "task.json"


@dataclass(frozen=True)
class Task:
    """folder: of the contestant. batch: rows of a peer's forward pass (0: ours, the Plan knows)."""

    folder: str
    case: str
    contestant: str
    gpus: int
    cpu: bool
    batch: int = 0
    profile: bool = False
    warmup: int = 10
    steps: int = 20
    seconds: float = 60.0

    @property
    def place(self) -> Path:
        return Path(self.folder)

    @property
    def row(self) -> Case:
        return EVERY[self.case]

    @property
    def limits(self) -> Limits:
        return Limits(self.warmup, self.steps, self.seconds)

    @property
    def optimizer_steps(self) -> int:
        """At most."""
        return max(self.warmup, COMPARED) + self.steps + PROFILED + 5

    def windows(self) -> Windows:
        """All of the data; every contestant makes the same."""
        case = self.row
        number = case.global_windows(self.gpus) * self.optimizer_steps
        return Windows(number, case.length, case.vocabulary, case.documents, case.pairs)

    def order(self, plan: Plan) -> Iterator[tuple[int, ...]]:
        """The windows of each optimizer step, as our loop takes them."""
        from hpcft.train.order import Order

        number = plan.batch.global_windows * self.optimizer_steps
        steps = Order(number, plan.batch.global_windows, plan.data.seed).steps(0)
        return (next(steps) for _ in range(self.optimizer_steps))

    def plan(self) -> Plan:
        return Plan.from_json((self.place / PLAN).read_text())

    def write(self, plan: Plan) -> Path:
        """Into its folder, without what an earlier run left there."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        (self.place / PLAN).write_text(plan.to_json())
        (self.place / TASK).write_text(json.dumps(asdict(self)))
        return self.place / TASK

    def result(self, facts: dict[str, Any]) -> None:
        """Written by the first rank."""
        (self.place / RESULT).write_text(json.dumps(facts))

    def say(self, *words: str) -> None:
        """Into the rank's log."""
        print(*words, flush=True)


def read_task(words: Sequence[str]) -> Task:
    """The one word of a rank's command line is its file."""
    return Task(**json.loads(Path(words[0]).read_text()))


def make(words: Sequence[str], model: Path, gpus: int, cpu: bool, save_steps: int = 0) -> Plan:
    """The Plan, as ``hpcft plan`` makes it for a node of such GPUs. Raises Refusal."""
    from hpcft.config.cluster import ClusterProfile
    from hpcft.config.load import load_run
    from hpcft.plan.make import make_plan
    from hpcft.plan.shape import read_shape

    given = ["--model", str(model), "--dataset", "made.jsonl", "--nproc_per_node", str(gpus)]
    given += ["--save_steps", str(save_steps), "--lr_scheduler_type", "constant", "--warmup_ratio", "0", *words]
    kind = None if cpu else device.kind_of(device.gpus()[1])
    profile = ClusterProfile(
        name="here", scheduler="none", accelerator="cpu" if cpu else "cuda", gpu_type=kind,
        gpus_per_node=0 if cpu else gpus, cores_per_node=max(gpus, os.cpu_count() or 1), node_memory=device.host_gib(),
    )  # fmt: skip
    return make_plan(load_run(given).run, profile, {}, read_shape(str(model)))
