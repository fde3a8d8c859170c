"""Ours and others' trainers in one call: same data and order, weights, adapters, optimizer, precision.

    python -m benchmarks.speed --folder SCRATCH [--cases NAME …] [--who NAME …] [--budget SECONDS] [--profile]

Every contestant is a process (or one a GPU) of its own with a limit of time. A row's time counts when its first losses
and gradient norms are ours. Rows go to SCRATCH/results.jsonl as they come; --report shows them again. --dry-run prints
the schedule; --cpu rehearses everything with shapes of no weight. docs/benchmarks.md tells how to read a row.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import device, table
from benchmarks.cases import CASES, EVERY, OURS, REHEARSAL, Case, merged
from benchmarks.numbers import least_bytes, roofline_speed
from benchmarks.peers import PEERS, batches, missing
from benchmarks.ranks import run_ranks, visible
from benchmarks.shapes import written
from benchmarks.task import PROFILED, RESULT, Task, make
from hpcft.errors import Refusal

START = 30.0  # seconds until the first step of a contestant: imports, weights, kernels; for schedules
WRITING = 1.5e9  # bytes of a model written in a second


@dataclass(frozen=True)
class Entry:
    """One contestant of one case on some GPUs: a row."""

    case: str
    contestant: str
    gpus: int

    @property
    def row(self) -> Case:
        return EVERY[self.case]

    @property
    def ours(self) -> bool:
        return self.contestant in OURS

    def seconds(self, given: argparse.Namespace) -> float:
        """Estimated, without the writing of the model."""
        if given.cpu:
            return 20.0
        share = OURS[self.contestant][1] if self.ours else PEERS[self.contestant].expect
        lengths, trained = self.data()
        rate = share * roofline_speed(self.row.work(self.gpus, lengths, trained), "h100") * self.gpus
        step = self.row.global_windows(self.gpus) * self.row.length / rate
        warm = min(given.warmup * step, max(3 * step, given.seconds))
        timed = min(given.steps * step, max(5 * step, given.seconds))
        profiled = (PROFILED * step + 15) if given.profile and self.ours else 0.0
        return float(START + warm + timed + profiled)

    def data(self) -> tuple[list[int], float]:
        """Lengths of some windows' documents, and the share of tokens that is trained."""
        windows = Task("", self.case, "", self.gpus, True).windows()
        some = [windows[n] for n in range(min(8, len(windows)))]
        lengths = [n for window in some for n in window.documents]
        return lengths, float(np.mean([window.trained.mean() for window in some]))


def entries(given: argparse.Namespace) -> Iterator[Entry]:
    """The rows to be made, ours first in each case."""
    table_of = REHEARSAL if given.cpu else CASES
    for name in given.cases or table_of:
        case = EVERY[name]
        for gpus in given.gpus or case.gpus:
            others = [who for who in given.who if who in OURS and who not in case.ours]
            for who in (*case.ours, *others, *case.peers):
                if not given.who or who in given.who:
                    yield Entry(name, who, gpus)


def run(entry: Entry, given: argparse.Namespace, limit: float, setting: dict[str, Any]) -> dict[str, Any]:
    """One row's facts; ``failed`` says why there are none."""
    case, (lengths, trained) = entry.row, entry.data()
    words = OURS[entry.contestant][0] if entry.ours else ""
    about = f"hpcft with {words or 'its defaults'}" if entry.ours else PEERS[entry.contestant].about
    facts = {
        "case": entry.case, "contestant": entry.contestant, "gpus": entry.gpus, "ours": entry.ours, "about": about,
        "tokens": case.global_windows(entry.gpus) * case.length, "lengths": lengths, "trained": trained,
        "gpu": device.kind_of(setting["device"]), "setting": setting, "run": given.run, "command": given.command,
    }  # fmt: skip
    if not given.cpu and setting["count"] < entry.gpus:
        return {**facts, "failed": f"needs {entry.gpus} GPUs, there are {setting['count']}"}
    if not entry.ours and (why := missing(PEERS[entry.contestant])):
        return {**facts, "failed": why}
    try:
        model = written(given.folder / case.model, case.model, given.cpu)
    except subprocess.CalledProcessError as error:
        return {**facts, "failed": f"the model could not be written: exit code {error.returncode}"}
    steps = {"warmup": given.warmup, "steps": given.steps, "seconds": given.seconds}
    place = str(given.folder / "runs" / f"{entry.case}-{entry.gpus}-{entry.contestant}")
    task = Task(place, entry.case, entry.contestant, entry.gpus, given.cpu, profile=given.profile, **steps)
    base = [f"--max_length {case.length} --global_batch_size {case.global_windows(entry.gpus)}",
            f"--max_steps {task.optimizer_steps}", case.words]  # fmt: skip
    try:
        plan = make(
            merged(*base, words, "" if entry.ours else "--gradient_checkpointing full"), model, entry.gpus, given.cpu
        )
    except Refusal as refusal:
        return {**facts, "failed": f"Refusal: {refusal.problems[0].what}"}
    end = time.monotonic() + limit
    failed: str | None = None
    for batch in [0] if entry.ours else fitting(task, setting):
        task = Task(**{**task.__dict__, "batch": batch})
        module = "benchmarks.ours" if entry.ours else "benchmarks.peers"
        words, left = [str(task.write(plan))], end - time.monotonic()
        failed = run_ranks(module, words, entry.gpus, task.place, left, visible(entry.gpus))
        result = task.place / RESULT
        if failed is None and result.is_file():
            return {**facts, **json.loads(result.read_text())}
        if failed is None or "out of memory" not in failed.lower() or end - time.monotonic() < START:
            break
    return {**facts, "failed": failed or "ended without a result"}


def fitting(task: Task, setting: dict[str, Any]) -> list[int]:
    """A peer's batches to try, without those that cannot fit by the least that they need."""
    peer, case = PEERS[task.contestant], task.row
    tried = batches(task, peer)
    card = float(setting["gpu"].get("memory.total", 0)) * 2**20
    if not card or task.contestant in ("trl", "trl-dpo-defaults"):  # these recompute
        return tried
    work = case.work(task.gpus, [case.length], 1.0)
    left = [n for n in tried if least_bytes(work, forward_tokens(task, n), "bf16" not in task.contestant) < card]
    return left or tried[-1:]


def forward_tokens(task: Task, rows: int) -> int:
    """The most that a forward pass of so many rows takes, padding with it."""
    peer, case = PEERS[task.contestant], task.row
    if peer.packed:
        return rows * case.length
    windows = task.windows()
    lengths = [n for index in range(min(len(windows), 8)) for n in windows[index].documents]
    each = rows * (2 if case.pairs else 1)
    return max(each * max(lengths[at : at + each]) for at in range(0, len(lengths), each))


def schedule(rows: Sequence[Entry], given: argparse.Namespace) -> str:
    """What would run, and how long it is estimated to take."""
    lines = ["| case | who | GPUs | windows × tokens a step | seconds, estimated |", "| --- | --- | --- | --- | --- |"]
    whole, seen = 0.0, set[str]()
    for entry in rows:
        seconds = entry.seconds(given)
        if entry.row.model not in seen:
            seen.add(entry.row.model)
            seconds += 2 * entry.row.shape.parameters / WRITING
        whole += seconds
        what = f"{entry.row.global_windows(entry.gpus)} × {entry.row.length}"
        lines.append(f"| {entry.case} | {entry.contestant} | {entry.gpus} | {what} | {seconds:.0f} |")
    return "\n".join(
        [*lines, f"\n{whole:.0f} s in all, as on H100; a batch that does not fit costs {START:.0f} s more."]
    )


def load(file: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that a kill has cut is left out."""
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"left out a line of {file.name} that is cut off", file=sys.stderr)
    return records


def measure(rows: Sequence[Entry], given: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows in turn, each printed and written down when it is there."""
    began, setting = time.monotonic(), device.facts(given.cpu)
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{device.said(setting)}\n\n{table.HEAD}", flush=True)
    records: list[dict[str, Any]] = []
    for entry in rows:
        left = given.budget - (time.monotonic() - began)
        if entry.seconds(given) > left:
            print(f"not started: {entry.case} {entry.contestant}, {left:.0f} s are left", file=sys.stderr, flush=True)
            continue
        records.append(run(entry, given, min(given.limit, left), setting))
        with (given.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(table.row(records[-1], records), flush=True)
    return records


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, logs, results; /dev/shm is fastest")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help=", ".join(EVERY))
    parser.add_argument("--who", nargs="+", default=[], metavar="NAME", help=", ".join((*OURS, *PEERS)))
    parser.add_argument("--gpus", nargs="+", type=int, default=[], help="instead of the numbers of GPUs of each case")
    parser.add_argument("--warmup", type=int, default=10, help="optimizer steps before the timed ones")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--seconds", type=float, default=45.0, help="of the timed window; slow ones make fewer steps")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one contestant")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none is started")
    parser.add_argument("--profile", action="store_true", help="kernels of three more steps of ours, by group")
    parser.add_argument("--dry-run", action="store_true", help="print the schedule only")
    parser.add_argument("--report", action="store_true", help="show SCRATCH/results.jsonl, measure nothing")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the table to FILE, with date and command")
    parser.add_argument("--cpu", action="store_true", help="rehearse with tiny shapes")
    given = parser.parse_args(words)
    if unknown := [name for name in given.cases if name not in EVERY]:
        parser.error(f"--cases: no case {', '.join(unknown)}; there are {', '.join(EVERY)}")
    if unknown := [name for name in given.who if name not in OURS and name not in PEERS]:
        parser.error(f"--who: no contestant {', '.join(unknown)}; there are {', '.join((*OURS, *PEERS))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through finally, which ends the ranks
    given.run = datetime.now(timezone.utc).isoformat(timespec="seconds")
    given.command = command(words, given.folder)
    rows = list(entries(given))
    if given.dry_run:
        print(schedule(rows, given))
        return 0
    records = load(given.folder / "results.jsonl") if given.report else measure(rows, given)
    if not records:
        print("no results", file=sys.stderr)
        return 1
    runs = dict.fromkeys(record["run"] for record in records)
    groups = [[record for record in records if record["run"] == run] for run in runs]
    print("\n".join(map(table.report if given.report else table.beside, groups)), flush=True)
    if given.append:
        with given.append.open("a") as file:
            file.write("".join(map(table.section, groups)))
    return int(any(table.counted(r, group) for group in groups for r in group))


def command(words: Sequence[str], folder: Path) -> str:
    """The line that repeats it, without where it was run and what only concerns the report."""
    kept = list(words)
    if "--append" in kept:
        at = kept.index("--append")
        del kept[at : at + 2]
    return "python -m benchmarks.speed " + shlex.join("SCRATCH" if word == str(folder) else word for word in kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
