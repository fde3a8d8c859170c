"""Strategies on real shapes: do they train, do their losses agree, is the memory as foretold, what does loading take?

    python -m benchmarks.strategies --folder SCRATCH [--cases NAME …] [--steps 8] [--cpu]

Every case is a run of its own: as many processes as it has GPUs, random weights of a real shape, read from files that
are written once. Prints a Markdown row per case; the rows and every loss are in SCRATCH/results.jsonl. --cpu rehearses
all of it with two ranks and a shape of no weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "qwen-7b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    "qwen-1.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip


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
    # What does not fit on one GPU otherwise.
    "8b-full-zero3-offload": Case("llama-8b", 1, f"{FULL} --strategy zero3_offload"),
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
MEAN_DOCUMENT = 235


class Windows:
    """Windows of random documents, the same on every rank; nothing is read from disk."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        from hpcft.data.shards import Window

        draw = np.random.default_rng(index)
        lengths = draw.exponential(MEAN_DOCUMENT, self.length).astype(int) + 8
        used = int(np.searchsorted(np.cumsum(lengths), self.length))
        documents = [int(n) for n in lengths[:used]]
        if rest := self.length - sum(documents):
            documents.append(rest)
        tokens = draw.integers(0, self.vocabulary, self.length).astype(np.int32)
        trained = np.ones(self.length, bool)
        trained[np.cumsum([0, *documents[:-1]])] = False
        return Window(tokens, trained, documents)

    def trained_tokens(self, index: int) -> int:
        return int(self[index].trained.sum())


@dataclass
class Prepared:
    """What ``assemble`` wants of prepared data."""

    train: Windows
    validation: None = None
    content: str = "made-for-a-measurement"


def write_model(folder: Path, shape: dict[str, Any], device: str) -> Path:
    """Configuration and random bfloat16 weights, a file a few layers; once."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, "torch_dtype": "bfloat16"}))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    torch.manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(names.values())):05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(held, file))
        held.clear()

    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1
        made = torch.randn(parameter.shape, device=device) * 0.02 if matrix else torch.ones(parameter.shape)
        held[name] = (made if "bias" not in name else made * 0).to(torch.bfloat16).cpu()
        if sum(t.numel() for t in held.values()) > 1e9:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def make(case: Case, model: Path, cpu: bool, steps: int) -> Any:
    """The Plan, as ``hpcft plan`` makes it for a node of such GPUs."""
    from hpcft.config.cluster import ClusterProfile
    from hpcft.config.load import load_run
    from hpcft.plan.make import make_plan
    from hpcft.plan.shape import read_shape

    words = ["--model", str(model), "--dataset", "made.jsonl", "--nproc_per_node", str(case.gpus)]
    words += [
        "--global_batch_size",
        str(WINDOWS),
        "--max_steps",
        str(steps),
        "--max_length",
        str(64 if cpu else LENGTH),
    ]
    words += ["--save_steps", "0", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", *case.words.split()]
    words += [] if "--gradient_checkpointing" in case.words else ["--gradient_checkpointing", "full"]
    profile = ClusterProfile(
        name="here", scheduler="none", accelerator="cpu" if cpu else "cuda", gpu_type=None if cpu else _gpu_type(),
        gpus_per_node=0 if cpu else case.gpus, cores_per_node=os.cpu_count() or 1, node_memory=_host_gib(),
    )  # fmt: skip
    return make_plan(load_run(words).run, profile, {}, read_shape(str(model)))


def _gpu_type() -> str:
    import torch

    name = torch.cuda.get_device_name(0).lower()
    return next((kind for kind in ("h100", "h200", "a100", "b200") if kind in name), "h100")


def _host_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


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


def rank(file: Path) -> None:
    """One rank of a case: load, train, and rank 0 writes what came of it."""
    import torch

    from hpcft.plan.plan import Plan
    from hpcft.run.paths import RunPaths
    from hpcft.train import assemble, loop, world
    from hpcft.train.signals import Signals

    plan = Plan.from_json(file.read_text())
    here = world.join(plan, os.environ)
    if here.device.type == "cuda":
        torch.zeros(1, device=here.device)
    vocabulary = json.loads((Path(plan.model.path) / "config.json").read_text())["vocab_size"]
    prepared = Prepared(Windows(512, plan.data.max_length, vocabulary))
    loading: dict[str, float] = {}
    with watched(loading):
        run = assemble.assemble(plan, RunPaths(file.parent), here, Signals(), os.environ, prepared=prepared)
    losses, seconds, norms = [], [], []
    while not run.finished:
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
            "losses": losses, "norms": norms, "step": float(np.median(seconds[2:] or seconds)),
            "anonymous": sum(columns[0]), "read": sum(columns[1]), "load": max(columns[2]),
            "peak": max(columns[3]), "reserved": max(columns[4]),
        }  # fmt: skip
        (file.parent / "result.json").write_text(json.dumps(facts))
    here.barrier()
    sys.stdout.flush()
    os._exit(0)


def run_case(name: str, case: Case, folder: Path, cpu: bool, steps: int, limit: float) -> dict[str, Any]:
    """All ranks of one case; what rank 0 wrote, or the last words of the first rank that failed."""
    place = folder / "cases" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").unlink(missing_ok=True)
    model = write_model(folder / case.model, SHAPES[case.model], "cpu" if cpu else "cuda")
    plan = make(case, model, cpu, steps)
    (place / "plan.json").write_text(plan.to_json())
    environ = {
        **os.environ, "WORLD_SIZE": str(case.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port()),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "4",
    }  # fmt: skip
    logs = [place / f"rank-{n}.log" for n in range(case.gpus)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.strategies", "--rank", str(place / "plan.json")],
            env={**environ, "RANK": str(n), "LOCAL_RANK": str(n)}, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for n, log in enumerate(logs)
    ]  # fmt: skip
    end = time.monotonic() + limit
    while any(p.poll() is None for p in processes) and time.monotonic() < end and not any(p.poll() for p in processes):
        time.sleep(0.2)
    for process in processes:
        process.kill()
    result = place / "result.json"
    if not result.is_file():
        failed = next((n for n, p in enumerate(processes) if p.poll() not in (0, None, -9)), 0)
        return {"case": name, "failed": logs[failed].read_text()[-1500:]}
    foretold = plan.memory.allocated if plan.memory else 0
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    facts = {"case": name, "gpus": case.gpus, "foretold": foretold, "size": size, "words": case.words}
    return {**facts, "foretold_step": _foretold_step(plan), **json.loads(result.read_text())}


def _foretold_step(plan: Any) -> float:
    from hpcft.plan.speed import step_time

    time_of = step_time(plan, plan.memory.shape, plan.memory.hardware) if plan.memory else None
    return time_of.total if time_of else 0.0


def _port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def row(facts: dict[str, Any]) -> str:
    """One Markdown row."""
    if "failed" in facts:
        return f"| {facts['case']} | failed: {facts['failed'].strip().splitlines()[-1][:100]} |"
    gib = 2**30
    off = facts["peak"] / facts["foretold"] - 1 if facts["foretold"] else 0.0
    tokens = WINDOWS * LENGTH / facts["step"] / facts["gpus"]
    return (
        f"| {facts['case']} | {facts['gpus']} | {facts['losses'][0]:.4f} → {facts['losses'][-1]:.4f} | "
        f"{facts['peak'] / gib:.1f} ({facts['foretold'] / gib:.1f} foretold, {off:+.0%}) | "
        f"{facts['step']:.2f} s ({facts['foretold_step']:.2f}) | {tokens:,.0f} | "
        f"{facts['load']:.1f} s, {facts['anonymous'] / facts['size']:.2f}, {facts['read'] / facts['size']:.2f} |"
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
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one case")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rank:
        rank(given.rank)
    table = REHEARSAL if given.cpu else CASES
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{versions(given.cpu)}\n\n{HEAD}", flush=True)
    failed = 0
    for name in given.cases or table:
        facts = run_case(name, table[name], given.folder, given.cpu, given.steps, given.limit)
        with (given.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
        print(row(facts), flush=True)
        failed += "failed" in facts
    return int(bool(failed))


def versions(cpu: bool) -> str:
    """Device and software, as every table of measurements says them."""
    import torch
    import transformers

    device = "CPU" if cpu else f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
