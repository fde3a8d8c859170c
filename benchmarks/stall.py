"""How long a checkpoint stops the ranks, beside what writing it takes, and what torch.save takes for the same tensors.

    python -m benchmarks.stall --folder SCRATCH [--case 2b-full-short] [--every 5] [--saves 3] [--cpu]

The folder should lie on the disk that is asked about. Stall and duration are those of the run's own ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import device
from benchmarks.cases import EVERY, OURS, merged
from benchmarks.made import Prepared
from benchmarks.ranks import run_ranks, visible
from benchmarks.shapes import written
from benchmarks.task import RESULT, Task, make, read_task

COLUMNS = (
    "case",
    "GPUs",
    "checkpoint",
    "stall, median and worst",
    "until published",
    "step beside a save",
    "torch.save",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def rank(task: Task) -> None:
    """Train and save as the plan says; rank 0 writes what the ledger and its own clock say."""
    from hpcft.run.ledger import read_events
    from hpcft.run.paths import RunPaths
    from hpcft.train import assemble, loop, world
    from hpcft.train.signals import Signals

    plan, paths = task.plan(), RunPaths(task.place)
    here = world.join(plan, os.environ)
    run = assemble.assemble(plan, paths, here, Signals(), os.environ, prepared=Prepared(task.windows()))
    steps: list[tuple[float, float]] = []  # begin and end, seconds since 1970
    asked = run.stopping.look()
    while not loop.at_edge(run, asked) and not run.finished:
        began = time.time()
        asked = loop.optimizer_step(run, next(run.steps)).asked
        if here.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        steps.append((began, time.time()))
        run.saving.reserve()
    run.saving.settle()
    here.barrier()
    if here.first:
        saves = [event for event in read_events(paths) if event["event"] == "saved"]
        newest = max(paths.checkpoints.iterdir(), key=lambda folder: folder.name)
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        plain = synchronous(run, task.place / "torch.save")
        task.result({"saves": saves, "steps": steps, "bytes": size, "synchronous": plain})
    here.barrier()


def synchronous(run: Any, file: Path) -> float:
    """Seconds in which torch.save writes this rank's masters and moments, and they are on the disk."""
    import torch

    began = time.perf_counter()
    with file.open("wb") as stream:
        torch.save({f"{s.name}.{s.part}": s.tensor for s in run.sharded.shards()}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def row(case: str, gpus: int, facts: dict[str, Any]) -> str:
    """One Markdown row of a result. The first two steps are warm-up."""
    saves = facts["saves"]
    during = [(event["time"] - event["seconds"], event["time"]) for event in saves]
    beside, alone = [], []
    for begin, end in facts["steps"][2:]:
        busy = any(begin < stop and start < end for start, stop in during)
        (beside if busy else alone).append(end - begin)
    stalls = [event["stall"] for event in saves]
    slower = f"{median(beside) / median(alone) - 1:+.1%} of {median(alone):.3f} s" if beside and alone else "–"
    cells = (
        case,
        str(gpus),
        f"{facts['bytes'] / 1e9:.2f} GB",
        f"{median(stalls):.3f} s, {max(stalls):.3f} s ({len(stalls)})",
        f"{median(event['seconds'] for event in saves):.2f} s",
        slower,
        f"{facts['synchronous']:.2f} s (rank 0)",
    )
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str]) -> int:
    if words[:1] == ["--rank"]:
        rank(read_task(words[1:]))
        sys.stdout.flush()
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", choices=EVERY, default=None)
    parser.add_argument("--every", type=int, default=5, help="optimizer steps between two saves")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds")
    parser.add_argument("--cpu", action="store_true", help="rehearse with a tiny shape")
    given = parser.parse_args(words)
    name = given.case or ("tiny-full" if given.cpu else "2b-full-short")
    case, gpus = EVERY[name], EVERY[name].gpus[-1]
    steps = given.every * given.saves + given.every - 1  # some after the last save, beside which it is published
    task = Task(str(given.folder / "stall" / name), name, "us", gpus, given.cpu, steps=steps)
    model = written(given.folder / case.model, case.model, given.cpu)
    base = f"--max_length {case.length} --global_batch_size {case.global_windows(gpus)} {case.words} {OURS['us'][0]}"
    plan = make([*merged(base), "--max_steps", str(steps)], model, gpus, given.cpu, save_steps=given.every)
    print(f"{device.said(device.facts(given.cpu))}\n\n{HEAD}", flush=True)
    failed = run_ranks(
        "benchmarks.stall", ["--rank", str(task.write(plan))], gpus, task.place, given.limit, visible(gpus)
    )
    if failed:
        print(failed, file=sys.stderr)
        return 1
    print(row(name, gpus, json.loads((task.place / RESULT).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
