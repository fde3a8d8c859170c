"""Preparing at scale: how much slower than a bare parallel loop, how much memory, and what a kill costs.

    python -m benchmarks.prepare --folder SCRATCH [--records 1000000] [--workers 2] [--kill]

The bare loop parses the JSON, puts the turns into chatml with an f-string and encodes whole texts batch by batch, with
the same tokenizer in as many processes that are already up; it masks, checks and writes nothing. The two take turns of
some seconds, the other one stopped meanwhile, so that other load on the machine hits both alike. --kill prepares anew,
kills the process with SIGKILL in the middle, goes on with one worker and compares the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.prepare_data import write_records, write_tokenizer

BLOCK = 4 * 2**20  # bytes of the records that a process of the bare loop takes at a time
TOGETHER = 256
TURN, STRETCHES = 15.0, 12  # seconds of ours, and stretches of the bare loop, in turns
MAX_LENGTH = 4096


def make_plan(records: Path, tokenizer: Path, workers: int) -> Any:
    """The Plan of a run on these records."""
    from hpcft.cli.common import plan_run

    words = f"--cluster local --model {tokenizer} --dataset {records} --max_length {MAX_LENGTH}"
    return plan_run([*words.split(), "--dataset_num_proc", str(workers)]).plan


_tokenizer: Any


def _begin(folder: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer


def _bare(task: tuple[str, int, int]) -> int:
    """The tokens in one stretch of a file of lines."""
    path, start, end = task
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read(end - start).splitlines()
    tokens = 0
    for first in range(0, len(lines), TOGETHER):
        chats = [json.loads(line)["messages"] for line in lines[first : first + TOGETHER]]
        texts = ["".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in chat) for chat in chats]
        tokens += sum(len(e.ids) for e in _tokenizer.encode_batch(texts, add_special_tokens=False))
    return tokens


def stretches(path: Path) -> list[tuple[str, int, int]]:
    """The file in stretches of whole lines."""
    found, start, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start < size:
            file.seek(start + BLOCK)
            file.readline()
            end = min(file.tell(), size)
            found.append((str(path), start, end))
            start = end
    return found


class Bare:
    """The bare loop, its processes started and warm."""

    def __init__(self, tokenizer: Path, workers: int) -> None:
        self.workers = workers
        self.pool = multiprocessing.get_context("spawn").Pool(workers, _begin, (str(tokenizer),))
        self.seconds, self.cpu, self.tokens = 0.0, 0.0, 0
        self.left: list[tuple[str, int, int]] = []

    def run(self, tasks: Sequence[tuple[str, int, int]]) -> None:
        began, cpu = time.monotonic(), self._cpu()
        self.tokens += sum(self.pool.imap_unordered(_bare, tasks))
        self.seconds += time.monotonic() - began
        self.cpu += self._cpu() - cpu

    def turn(self) -> None:
        """Some of what is left."""
        some, self.left = self.left[:STRETCHES], self.left[STRETCHES:]
        if some:
            self.run(some)

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in psutil.Process().children())


@dataclass
class Ours:
    """One ``hpcft.data.prepare`` as a person starts it: imports, both passes, packing and publishing."""

    seconds: float
    cpu: float  # seconds of all processes, as far as they were seen
    peak: int  # bytes, PSS of the whole tree
    code: int
    said: str


def prepare(folder: Path, plan: Any, store: Path, kill_at: int = 0, other: Bare | None = None) -> Ours:
    """Prepare into ``store``; kill_at: SIGKILL once so many portions are tokenised; other: takes turns with us."""
    file = folder / f"plan-{plan.data.workers}.json"
    file.write_text(plan.to_json())
    log = folder / "prepare.log"
    words = [sys.executable, "-m", "hpcft.data.prepare", "--plan", str(file), "--store", str(store), "--json"]
    began = last = time.monotonic()
    stopped = 0.0
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stream)
    peak, cpu = 0, dict[int, float]()
    while process.poll() is None:
        peak = max(peak, _looked(process.pid, cpu))
        if kill_at and len(list(store.glob("work/*/read-*.npz"))) >= kill_at:
            tree = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            _, alive = psutil.wait_procs(tree, timeout=30)
            assert not alive, f"workers outlive the process that started them: {alive}"
        if other and other.left and time.monotonic() - last > TURN:
            since = time.monotonic()
            _signal(process.pid, signal.SIGSTOP)
            other.turn()
            _signal(process.pid, signal.SIGCONT)
            last = time.monotonic()
            stopped += last - since
        time.sleep(0.25)
    return Ours(time.monotonic() - began - stopped, sum(cpu.values()), peak, process.returncode, log.read_text())


def _signal(pid: int, number: signal.Signals) -> None:
    """To a process and all below it."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        one.send_signal(number)


def _looked(pid: int, cpu: dict[int, float]) -> int:
    """Proportional set size of a process and all below it, in bytes; their seconds of CPU go into ``cpu``."""
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with open(f"/proc/{process.pid}/smaps_rollup") as file:
                total += next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
            cpu[process.pid] = sum(process.cpu_times()[:2])
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, StopIteration):
        pass
    return total


def content(store: Path) -> dict[str, str]:
    """Name → SHA-256 of every file of the one content in a store."""
    (folder,) = {path.parent for path in store.glob("*/manifest.json")}
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.iterdir())}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args(arguments)
    folder = given.folder / f"{given.records}-{int(time.time())}"
    folder.mkdir(parents=True)
    from hpcft.data.tokenizer import CHATML

    tokenizer = write_tokenizer(given.folder / "tokenizer", CHATML)
    (tokenizer / "config.json").write_text('{"model_type": "qwen2"}')
    records = write_records(given.folder / f"records-{given.records}.jsonl", given.records)
    size = records.stat().st_size
    print(f"{versions()}\n{given.records:,} records, {size / 1e9:.2f} GB, {given.workers} processes", flush=True)
    tasks = stretches(records)
    bare = Bare(tokenizer, given.workers)
    bare.pool.map(_bare, tasks[:1] * given.workers, chunksize=1)  # all are up and warm
    bare.left = tasks
    bare.turn()
    ours = prepare(folder, make_plan(records, tokenizer, given.workers), folder / "store", other=bare)
    while bare.left:
        bare.turn()
    bare.pool.terminate()
    if ours.code:
        print(ours.said)
        return 1
    manifest = json.loads(next((folder / "store").glob("*/manifest.json")).read_text())
    print(row("bare loop", bare.seconds, bare.cpu, given.records, f"{bare.tokens:,} tokens"))
    train = manifest["splits"]["train"]
    made = f"{train['tokens']:,} tokens in {train['windows']:,} windows"
    print(row("prepare", ours.seconds, ours.cpu, given.records, made))
    print(f"ratio      {bare.seconds / ours.seconds:7.2f}     {bare.cpu / ours.cpu:7.2f} of CPU")
    print(f"peak       {ours.peak / 1e9:7.2f} GB (PSS of the whole process tree)", flush=True)
    return killed(folder, records, tokenizer, given.workers) if given.kill else 0


def row(what: str, seconds: float, cpu: float, records: int, more: str) -> str:
    """One line of the result."""
    return f"{what:<9}  {seconds:7.1f} s   {cpu:7.1f} s of CPU   {records / seconds:7,.0f} records/s   {more}"


def killed(folder: Path, records: Path, tokenizer: Path, workers: int) -> int:
    """Kill a prepare in the middle, go on with one worker, compare."""
    from hpcft.data.portions import cut
    from hpcft.data.sources import DataFile

    portions = len(cut(DataFile(records, str(records))).portions or ())
    first = prepare(folder, make_plan(records, tokenizer, workers), folder / "again", kill_at=portions // 2)
    second = prepare(folder, make_plan(records, tokenizer, 1), folder / "again")
    went_on = next((line for line in second.said.splitlines() if line.startswith("went on")), "did NOT go on")
    same = second.code == 0 and content(folder / "again") == content(folder / "store")
    left = sorted(path.name for path in (folder / "again").iterdir() if path.name not in ("locks", "requests"))
    print(
        f"killed     {first.seconds:7.1f} s  (exit {first.code})\n"
        f"continued  {second.seconds:7.1f} s with one worker: {went_on}\n"
        f"bytes      {'the same' if same else 'DIFFERENT'}; in the store: {', '.join(left)}"
    )
    return int(not same)


def versions() -> str:
    """Device and software, as every table of measurements says them."""
    import numpy
    import tokenizers
    import transformers

    with open("/proc/cpuinfo") as file:
        model = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), "CPU")
    software = (
        f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}"
    )
    return f"{os.cpu_count()} × {model}; Python {platform.python_version()}, {software}"


if __name__ == "__main__":
    sys.exit(main())
