"""A sweep from its plans into Slurm's queue: how long, and with how many calls of sbatch?

    python -m benchmarks.sweep [--runs 1000] [--times 5]

A private Slurm of four nodes on this machine, whose partition takes jobs and starts none. Each time a fresh folder and
as many runs: decided from the starter of the docs with a learning rate and a seed of its own, rendered as arrays and
handed over. Prints a Markdown row for each time.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcft.config.load import load_cluster, load_run
from hpcft.launch.sweep import submit_sweep
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from hpcft.resources import templates
from hpcft.slurm.limits import limits
from tests.loopback import LoopbackSlurm


def plans(count: int) -> list[Plan]:
    """So many runs of the starter ``tiny``."""
    profile, _ = load_cluster(str(templates() / "clusters" / "loopback.yaml"))
    starter = str(templates() / "runs" / "tiny.yaml")
    found = []
    for number in range(count):
        loaded = load_run([starter, "--name", f"run-{number:04d}", f"learning_rate={1e-5 * (number + 1)}"])
        found.append(make_plan(loaded.run, profile, loaded.origins))
    return found


@contextmanager
def counted(folder: Path) -> Iterator[Path]:
    """While this lasts every call of sbatch leaves a line in the file."""
    calls, real = folder / "calls", shutil.which("sbatch")
    calls.touch()
    (folder / "bin").mkdir()
    stand_in = folder / "bin" / "sbatch"
    stand_in.write_text(f'#!/bin/sh\necho "$*" >> "{calls}"\nexec "{real}" "$@"\n', encoding="utf-8")
    stand_in.chmod(0o700)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}/bin:{before}"
    try:
        yield calls
    finally:
        os.environ["PATH"] = before


def once(slurm: LoopbackSlurm, count: int, number: int) -> float:
    """One submission; its row is printed."""
    with tempfile.TemporaryDirectory() as place, counted(Path(place)) as calls:
        os.chdir(place)
        begin = time.perf_counter()
        runs = plans(count)
        decided = time.perf_counter()
        sent = submit_sweep("sweep", runs)
        taken = time.perf_counter() - decided
        arrays = {one.job_id.partition("_")[0] for one in sent.submitted}
        queued = slurm.run(["squeue", "-h", "--array", "-o", "%i"]).stdout.split()
        assert sorted(queued) == sorted(one.job_id for one in sent.submitted)
        said = len(calls.read_text(encoding="utf-8").splitlines())
        print(f"| {number} | {count:,} | {decided - begin:.2f} | {taken:.2f} | {len(arrays)} | {said} |", flush=True)
        slurm.cancel_all()
        os.chdir("/")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    words = parser.parse_args()
    with LoopbackSlurm() as slurm:
        os.environ.update({name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")})
        slurm.run(["scontrol", "update", "PartitionName=batch", "State=DOWN"])
        found = limits()
        where = f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores"
        print(f"Slurm {found.version}, MaxArraySize {found.max_array_size}, {where}\n")
        print("| time | runs | decided, s | rendered and submitted, s | arrays | calls of sbatch |")
        print("| --- | --- | --- | --- | --- | --- |")
        seconds = [once(slurm, words.runs, number + 1) for number in range(words.times)]
        print(f"\nmedian {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
