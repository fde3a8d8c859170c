"""The model as it was before training, as a number per document: a pass of its own before the first step.

A second copy of a model that is trained whole would double what a rank holds, and the only thing it is asked for is the
log-probability of each answer. So that is computed once, with the weights that training begins with, and kept in the
run folder; later attempts read it there, whatever the weights have become meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcft import disk
from hpcft.data.kinds import Kind
from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train.batches import ahead, on_device, rounds
from hpcft.train.modes import in_evaluation
from hpcft.train.protocols import Batch, Sharded, Window, Windows
from hpcft.train.scores import document_scores
from hpcft.train.windows import plain
from hpcft.train.world import World

ALL = tuple(Kind)
TRAIN = "train"


def with_references(
    plan: Plan, paths: RunPaths, world: World, sharded: Sharded, prepared: Any, alike: bool = False
) -> Any:
    """The data, its windows knowing their references.

    sharded: with the weights that training begins with: called before a checkpoint is loaded. alike: what is trained on
    goes through a pass of training, of which programs are others; what is only looked at is in an evaluation here, too.
    """
    facts = {
        "data": prepared.content,
        "model": plan.model.path,
        "revision": plan.model.revision,
        "dtype": plan.model.dtype,
    }
    splits = {TRAIN: prepared.train, "validation": prepared.validation}
    made: dict[str, Any] = {}
    for name, windows in splits.items():
        if windows:
            compute = partial(_computed, plan, world, sharded, windows, alike and name == TRAIN)
            made[name] = Referenced(windows, _numbers(paths.reference(name), facts, world, compute))
    return dataclasses.replace(prepared, **made)


class Referenced:
    """Fulfils ``protocols.Windows``. numbers: float32 [documents, 2], of each and of its prompt with another answer."""

    def __init__(self, windows: Windows, numbers: np.ndarray) -> None:
        self.windows, self.numbers, self.starts = windows, numbers, _starts(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        window = self.windows[index]
        mine = self.numbers[self.starts[index] : self.starts[index + 1]].tolist()
        own, others = ([numbers[column] for numbers in mine] for column in (0, 1))
        return dataclasses.replace(plain(window), reference=own, reference_of_others=others)

    def trained_tokens(self, index: int) -> int:
        """As the windows beneath."""
        return self.windows.trained_tokens(index)

    def count(self, index: int, kinds: Collection[int]) -> int:
        """As the windows beneath."""
        return self.windows.count(index, kinds)


def _starts(windows: Windows) -> np.ndarray:
    """The number of each window's first document, and of all."""
    return np.cumsum([0, *(windows.count(i, ALL) for i in range(len(windows)))])


def _numbers(file: Path, facts: dict[str, Any], world: World, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The file's, which is made where it is not there or of something else. facts: what the numbers are of."""
    if not world.max([float(world.first and _is_of(file, facts))])[0]:
        started = time.perf_counter()
        numbers = compute()
        if world.first:
            _write(file, numbers, facts)
            seconds = time.perf_counter() - started
            print(f"reference: {len(numbers):,} documents in {seconds:.0f} s", file=sys.stderr, flush=True)
        world.barrier()
    return np.load(file, mmap_mode="r")


def _is_of(file: Path, facts: dict[str, Any]) -> bool:
    try:
        return bool(file.is_file() and json.loads(_beside(file).read_text(encoding="utf-8")) == facts)
    except (OSError, ValueError):
        return False


def _beside(file: Path) -> Path:
    return file.with_suffix(".json")


def _write(file: Path, numbers: np.ndarray, facts: dict[str, Any]) -> None:
    """The numbers in one piece, then what says that they are whole.

    An attempt on a node that Slurm had given up may come here late, when the ranks of the next one read the file.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _beside(file).unlink(missing_ok=True)
    aside = file.with_name(f".{socket.gethostname()}-{os.getpid()}.{file.name}")
    try:
        np.save(aside, numbers)
        aside.chmod(0o600)
        disk.sync(aside)
        os.replace(aside, file)
    except OSError:  # every attempt on a full disk would leave another one
        aside.unlink(missing_ok=True)
        raise
    disk.replace(_beside(file), json.dumps(facts) + "\n")


def _computed(plan: Plan, world: World, sharded: Sharded, windows: Windows, alike: bool) -> np.ndarray:
    """float32 [documents, 2]: each document is one data rank's, and every rank makes as many forward passes."""
    starts, at = _starts(windows), (world.data_rank, world.data_size)
    numbers = torch.zeros(int(starts[-1]), 2)
    for made in ahead(rounds(windows, plan.batch.micro_windows, plan, *at), plan.train.dataloader_workers):
        batch = on_device(made, world.device)
        documents = [document for i in batch.windows for document in range(starts[i], starts[i + 1])]
        for column, one in enumerate(_both(batch)):
            with nullcontext() if alike and one is batch else in_evaluation(sharded.model):
                scores = document_scores(sharded.model, one).policy.detach()
            if world.speaks:
                numbers[documents, column] = scores.float().cpu()
    return world.add_up(numbers).numpy()


def _both(batch: Batch) -> list[Batch]:
    return [batch] if batch.others is None else [batch, batch.others]
