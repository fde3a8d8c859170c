"""The processes of one measurement: started with torchrun's variables, ended together, with a limit of time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

# As a run's script has it.
ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
STARTED = "BENCHMARK_STARTED"  # seconds since 1970 at which the ranks were started


def run_ranks(
    module: str, words: Sequence[str], ranks: int, place: Path, limit: float, extra: Mapping[str, str] | None = None
) -> str | None:
    """Run ``python -m module words`` as ``ranks`` processes with their logs in ``place``; None when all ended well.

    Else the end of the log of the first that failed. Ends every rank after ``limit`` seconds, or as soon as one fails.
    """
    with held_port() as port:
        return _run_ranks(module, words, ranks, place, limit, {"MASTER_PORT": str(port), **(extra or {})})


def _run_ranks(
    module: str, words: Sequence[str], ranks: int, place: Path, limit: float, extra: Mapping[str, str]
) -> str | None:
    logs = [place / f"rank-{n}.log" for n in range(ranks)]
    threads = max(1, min(4, (os.cpu_count() or 1) // ranks))  # more than there are cores wait for each other
    environ = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "PYTORCH_ALLOC_CONF": ALLOCATOR, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", STARTED: repr(time.time()), **extra,
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *words],
            env={**environ, "RANK": str(n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(ranks)},
            stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for n, log in enumerate(logs)
    ]  # fmt: skip
    end = time.monotonic() + limit
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() for p in processes):
                break
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    if failed := [n for n, code in enumerate(codes) if code]:
        return logs[failed[0]].read_text(errors="replace")[-3000:] or f"rank {failed[0]} ended with {codes[failed[0]]}"
    return f"not done after {limit:.0f} s" if None in codes else None


def visible(gpus: int) -> dict[str, str]:
    """The first of the GPUs that this process may use, as many as are needed: others would tempt a Trainer."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    named = listed if listed != [""] else [str(n) for n in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(named[:gpus])}


@contextmanager
def held_port() -> Iterator[int]:
    """A port to meet at. It stays bound, so that the system gives it to nobody else before the ranks listen there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store has it: they share it
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])
