"""Strategies on real shapes: do they train, do their losses agree, is the memory as foretold, what does loading take?

    python -m benchmarks.strategies --folder SCRATCH [--cases NAME …] [--steps 8] [--words=…] [--cpu]

Every case is a run of its own: as many processes as it has GPUs, random weights of a real shape, read from files that
are written once. Prints a Markdown row per case; the rows and every loss are in SCRATCH/results.jsonl. --cpu rehearses
all of it with two ranks and a shape of no weight; with --load-only real shapes can be loaded on CPUs, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.cases import merged
from benchmarks.made import MEAN_DOCUMENT, Prepared, Windows
from benchmarks.ranks import run_ranks
from benchmarks.shapes import forget, written
from benchmarks.task import make
from hpcft.plan.plan import Plan


@dataclass(frozen=True)
class Case:
    """model, GPUs, and the words that a person would add to the run."""

    model: str
    gpus: int
    words: str


FULL = "--tuner_type full --learning_rate 1e-5"
LORA = "--tuner_type lora --lora_dropout 0"
CASES: dict[str, Case] = {
    # Do all of them train, and to the same losses?
    "8b-full-fsdp": Case("llama-8b", 4, f"{FULL} --strategy fsdp"),
    "8b-full-zero3": Case("llama-8b", 4, f"{FULL} --strategy zero3"),
    "8b-full-tp4": Case("llama-8b", 4, f"{FULL} --strategy ddp --tp 4"),
    "8b-full-fsdp-tp2": Case("llama-8b", 4, f"{FULL} --strategy fsdp --tp 2"),
    "8b-lora-ddp": Case("llama-8b", 4, f"{LORA} --strategy ddp"),
    "8b-lora-fsdp": Case("llama-8b", 4, f"{LORA} --strategy fsdp"),
    "8b-qlora-fsdp": Case("llama-8b", 4, f"{LORA} --strategy fsdp --quant_bits 4"),
    # The same on two.
    **{
        f"1.5b-full-{name}": Case("qwen-1.5b", 2, f"{FULL} --strategy {words}")
        for name, words in (
            ("ddp", "ddp"),
            ("zero2", "zero2"),
            ("zero3", "zero3"),
            ("fsdp", "fsdp"),
            ("tp2", "ddp --tp 2"),
        )
    },
    "8b-full-fsdp-2": Case("llama-8b", 2, f"{FULL} --strategy fsdp"),
    "8b-full-zero3-2": Case("llama-8b", 2, f"{FULL} --strategy zero3"),
    "8b-full-tp2": Case("llama-8b", 2, f"{FULL} --strategy ddp --tp 2"),
    "8b-lora-ddp-2": Case("llama-8b", 2, f"{LORA} --strategy ddp"),
    "8b-qlora-fsdp-2": Case("llama-8b", 2, f"{LORA} --strategy fsdp --quant_bits 4"),
    # What does not fit on one GPU otherwise.
    "5b-full-zero3-offload": Case("llama-5b", 1, f"{FULL} --strategy zero3_offload"),
    # Memory on one GPU: tuning, recomputation.
    **{
        f"1.5b-full-{level}": Case("qwen-1.5b", 1, f"{FULL} --strategy ddp --gradient_checkpointing {level}")
        for level in ("none", "selective", "full")
    },
    **{
        f"7b-lora-{level}": Case("qwen-7b", 1, f"{LORA} --strategy ddp --gradient_checkpointing {level}")
        for level in ("none", "selective", "full")
    },
    "7b-qlora": Case("qwen-7b", 1, f"{LORA} --strategy ddp --quant_bits 4"),
    "1.5b-lora": Case("qwen-1.5b", 1, f"{LORA} --strategy ddp"),
}
REHEARSAL: dict[str, Case] = {
    "tiny-full-fsdp": Case("tiny", 2, f"{FULL} --strategy fsdp"),
    "tiny-full-zero3": Case("tiny", 2, f"{FULL} --strategy zero3"),
    "tiny-full-tp2": Case("tiny", 2, f"{FULL} --strategy ddp --tp 2"),
    "tiny-lora-ddp": Case("tiny", 2, f"{LORA} --strategy ddp"),
}
LENGTH, WINDOWS = 4096, 8  # tokens in a window, windows of an optimizer step


def plan_of(case: Case, model: Path, cpu: bool, steps: int, words: str) -> Plan:
    """The Plan of a case with some words more; every activation recomputed where they do not say otherwise."""
    every = merged(
        f"--global_batch_size {WINDOWS} --max_steps {steps} --max_length {64 if cpu else LENGTH}",
        f"--gradient_checkpointing full {case.words} {words}",
    )
    return make(every, model, case.gpus, cpu)


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """The most anonymous memory above the level before, and bytes read from storage, while the block runs."""
    before, read_before, ended = _anonymous(), _bytes_read(), threading.Event()
    peak = [before]

    def look() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    began = time.perf_counter()
    yield
    ended.set()
    thread.join()
    found |= {"anonymous": peak[0] - before, "read": _bytes_read() - read_before, "load": time.perf_counter() - began}


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    return 0


def rank(file: Path, load_only: bool) -> None:
    """One rank of a case: load, train, and rank 0 writes what came of it."""
    import torch

    from hpcft.run.paths import RunPaths
    from hpcft.train import assemble, loop, world
    from hpcft.train.signals import Signals

    plan = Plan.from_json(file.read_text())
    here = world.join(plan, os.environ)
    if here.device.type == "cuda":
        torch.zeros(1, device=here.device)
    vocabulary = json.loads((Path(plan.model.path) / "config.json").read_text())["vocab_size"]
    documents = max(1, round(plan.data.max_length / MEAN_DOCUMENT))
    prepared = Prepared(Windows(512, plan.data.max_length, vocabulary, documents))
    loading: dict[str, float] = {}
    with watched(loading):
        run = assemble.assemble(plan, RunPaths(file.parent), here, Signals(), os.environ, prepared=prepared)
    losses, seconds, norms = [], [], []
    while not run.finished and not load_only:
        began = time.perf_counter()
        report = loop.optimizer_step(run, next(run.steps))
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(report.mean_loss)
        norms.append(report.norm)
    cuda = here.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    rows = here.exchange([loading["anonymous"], loading["read"], loading["load"], peak, reserved])
    if here.first:
        columns = list(zip(*rows, strict=True))
        facts = {
            "losses": losses, "norms": norms, "step": float(np.median(seconds[2:] or seconds or [0.0])),
            "anonymous": sum(columns[0]), "read": sum(columns[1]), "load": max(columns[2]),
            "peak": max(columns[3]), "reserved": max(columns[4]),
        }  # fmt: skip
        (file.parent / "result.json").write_text(json.dumps(facts))
    here.barrier()
    sys.stdout.flush()
    os._exit(0)


def run_case(name: str, case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """All ranks of one case; what rank 0 wrote, or the last words of the first rank that failed."""
    place = given.folder / "cases" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").unlink(missing_ok=True)
    model = written(given.folder / case.model, case.model, given.cpu)
    plan = plan_of(case, model, given.cpu, given.steps, given.words)
    (place / "plan.json").write_text(plan.to_json())
    call = ["--rank", str(place / "plan.json"), *(["--load-only"] if given.load_only else [])]
    if given.load_only:
        forget(model)
    failed = run_ranks("benchmarks.strategies", call, case.gpus, place, given.limit)
    result = place / "result.json"
    if failed or not result.is_file():
        return {"case": name, "failed": failed or "ended without a result"}
    foretold = plan.memory.allocated if plan.memory else 0
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    facts = {
        "case": name,
        "gpus": case.gpus,
        "foretold": foretold,
        "size": size,
        "words": f"{case.words} {given.words}".strip(),
    }
    return {**facts, "foretold_step": _foretold_step(plan), **json.loads(result.read_text())}


def _foretold_step(plan: Any) -> float:
    from hpcft.plan.speed import step_time

    time_of = step_time(plan, plan.memory.shape, plan.memory.hardware) if plan.memory else None
    return time_of.total if time_of else 0.0


def row(facts: dict[str, Any]) -> str:
    """One Markdown row."""
    if "failed" in facts:
        return f"| {facts['case']} | failed: {facts['failed'].strip().splitlines()[-1][:100]} |"
    gib = 2**30
    off = facts["peak"] / facts["foretold"] - 1 if facts["foretold"] else 0.0
    loading = f"{facts['load']:.1f} s, {facts['anonymous'] / facts['size']:.2f}, {facts['read'] / facts['size']:.2f} |"
    if not facts["losses"]:
        return f"| {facts['case']} | {facts['gpus']} | – | – | – | – | {loading}"
    tokens = WINDOWS * LENGTH / facts["step"] / facts["gpus"]
    return (
        f"| {facts['case']} | {facts['gpus']} | {facts['losses'][0]:.4f} → {facts['losses'][-1]:.4f} | "
        f"{facts['peak'] / gib:.1f} ({facts['foretold'] / gib:.1f} foretold, {off:+.0%}) | "
        f"{facts['step']:.2f} s ({facts['foretold_step']:.2f}) | {tokens:,.0f} | {loading}"
    )


HEAD = (
    "| case | GPUs | loss | peak GiB | step | tokens/s/GPU | loading: time, anonymous memory and bytes read ÷ size |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--words", default="", help='added to each run, as in --words="--torch_compile false"')
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one case")
    parser.add_argument("--load-only", action="store_true", help="take no step, and read the files from the disk")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rank:
        rank(given.rank, given.load_only)
    every = {**REHEARSAL, **CASES}
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{device.said(device.facts(given.cpu))}\n\n{HEAD}", flush=True)
    failed = 0
    for name in given.cases or (REHEARSAL if given.cpu else CASES):
        facts = run_case(name, every[name], given)
        with (given.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
        print(row(facts), flush=True)
        failed += "failed" in facts
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
