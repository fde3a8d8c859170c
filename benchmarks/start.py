"""From the start of a rank's process to the end of its first optimizer step, cold and warm.

    python -m benchmarks.start --folder SCRATCH [--cases 7b-lora-short …] [--words=…] [--cpu]

Cold: compile caches are empty and the model's files are not in the page cache (on a file system in memory, such as
/dev/shm, they always are: name a folder on the disk that is asked about). Warm: the same again. Python's own files are
read by what ran before, both times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import device, shapes
from benchmarks.cases import EVERY, OURS, merged
from benchmarks.ranks import run_ranks, visible
from benchmarks.shapes import written
from benchmarks.task import RESULT, Task, make

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PHASES = ("rendezvous", "data", "model", "strategy", "checkpoint")
HEAD = (
    "| case | | imports, rendezvous | data | model | weights, strategy | checkpoint | first step | in all |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def forget(model: Path, caches: Path) -> None:
    """Empty the compile caches and ask the kernel to drop the model's pages."""
    shutil.rmtree(caches, ignore_errors=True)
    shapes.forget(model)


def measured(name: str, words: str, folder: Path, cpu: bool, limit: float) -> Iterator[str]:
    """A Markdown row cold and one warm."""
    case, gpus = EVERY[name], EVERY[name].gpus[-1]
    model, caches = written(folder / case.model, case.model, cpu), folder / "caches"
    task = Task(str(folder / "start" / name), name, "us", gpus, cpu, warmup=3, steps=5, seconds=1.0)
    base = f"--max_length {case.length} --global_batch_size {case.global_windows(gpus)} {case.words} {OURS['us'][0]}"
    plan = make(merged(base, words, f"--max_steps {task.optimizer_steps}"), model, gpus, cpu)
    forget(model, caches)
    for temperature in ("cold", "warm"):
        environ = {**visible(gpus), **{variable: str(caches / variable) for variable in CACHES}}
        failed = run_ranks("benchmarks.ours", [str(task.write(plan))], gpus, task.place, limit, environ)
        if failed:
            yield f"| {name} | {temperature} | failed: {failed.strip().splitlines()[-1][:100]} | | | | | | |"
            continue
        facts = json.loads((task.place / RESULT).read_text())
        ends = [facts["phases"][phase] for phase in PHASES] + [facts["first_step"]]
        took = [end - before for before, end in zip([0.0, *ends], ends, strict=False)]
        yield f"| {name} | {temperature} | {' | '.join(f'{seconds:.1f} s' for seconds in [*took, ends[-1]])} |"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=EVERY, default=None)
    parser.add_argument("--words", default="", help='added to the run, as in --words="--gradient_checkpointing full"')
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one start")
    parser.add_argument("--cpu", action="store_true", help="rehearse with a tiny shape")
    given = parser.parse_args(words)
    print(f"{device.said(device.facts(given.cpu))}\n\n{HEAD}", flush=True)
    failed = False
    for name in given.cases or (["tiny"] if given.cpu else ["7b-lora-short"]):
        for line in measured(name, given.words, given.folder, given.cpu, given.limit):
            print(line, flush=True)
            failed = failed or "failed:" in line
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
