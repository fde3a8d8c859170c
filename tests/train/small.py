"""Small real models, hand-made windows, and a few ranks as forked processes: what the trainer's tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft  # noqa: F401  imported once here, not in every forked rank
import torch
import torch.utils.tensorboard
from transformers import Qwen2ForCausalLM  # noqa: F401

from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, world
from hpcft.train.metrics import read_metrics
from hpcft.train.signals import Signals
from tests import plans

VOCABULARY = 96
torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")


@dataclass
class Window:
    tokens: np.ndarray
    trained: np.ndarray
    documents: list[int]
    kinds: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kinds = self.kinds or [0] * len(self.documents)
        self.margins = self.margins or [0.0] * len(self.documents)


class Windows(list):
    def count(self, index: int, kinds: Collection[int]) -> int:  # type: ignore[override]
        return sum(kind in kinds for kind in self[index].kinds)

    def trained_tokens(self, index: int) -> int:
        return int(self[index].trained.sum())


@dataclass
class Prepared:
    train: Windows
    validation: Windows | None = None
    content: str = "0123456789abcdef"


def windows(count: int, length: int = 24, seed: int = 0) -> Windows:
    """``count`` windows of one to three documents of uneven lengths, unevenly masked."""
    draw = np.random.default_rng(seed)
    return Windows(window(draw, length) for _ in range(count))


def window(draw: np.random.Generator, length: int) -> Window:
    documents = [int(n) for n in draw.integers(4, length // 3 + 1, size=draw.integers(1, 4))]
    tokens = draw.integers(0, VOCABULARY, size=sum(documents)).astype(np.int32)
    trained = draw.random(len(tokens)) < draw.uniform(0.2, 0.9)
    starts = np.cumsum([0, *documents[:-1]])
    trained[starts] = False
    trained[starts[0] + 1] = True
    return Window(tokens, trained, documents)


def save_model(folder: Path, **changes: Any) -> Path:
    """A folder with the configuration of a Qwen2 of two layers, hidden 64."""
    from transformers import Qwen2Config

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    Qwen2Config(**{**values, **changes}).save_pretrained(folder)
    return folder


def tiny(folder: Path, ranks: int = 1, **changes: Any) -> Plan:
    """A Plan on ``ranks`` local CPU ranks."""
    changes["model"] = {"path": str(folder), **changes.get("model", {})}
    changes.setdefault("layout", plans.layout(1, ranks))
    return plans.plan(**changes)


def train_here(plan: Plan, root: Path, prepared: Prepared, watch: Any = None) -> dict[str, Any]:
    """One rank's whole life but the process: join, assemble, train. What came out, as plain values.

    watch: called as watch(step, signals, run) in every optimizer step before the ranks agree.
    """
    signals = Signals()
    signals.install()
    here = world.join(plan, os.environ)
    run = assemble.assemble(plan, RunPaths(root), here, signals, os.environ, prepared=prepared)
    if watch is not None:
        _spy(run, watch, signals)
    finished = loop.train(run)
    here.barrier()
    run.metrics.close()
    trained = {name: p for name, p in run.sharded.model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().double().flatten().tolist() for name, p in trained.items()}
    return {"finished": finished, "progress": run.progress.to_json(), "weights": weights}


def _spy(run: Any, watch: Callable[..., None], signals: Signals) -> None:
    reduce = run.sharded.reduce

    def reduced() -> None:
        reduce()
        watch(run.progress.step + 1, signals, run)

    run.sharded.reduce = reduced


def environment(rank: int, size: int, port: int, attempt: int = 1) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HPCFT_ATTEMPT": str(attempt),
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, attempt: int = 1) -> list[Any]:
    """``work(*arguments)`` on ``size`` forked ranks; what each returned, or raises with its traceback."""
    port = free_port()
    receivers, processes = [], []
    for rank in range(size):
        receiver, sender = FORK.Pipe(duplex=False)
        environ = environment(rank, size, port, attempt)
        process = FORK.Process(target=_rank, args=(sender, work, arguments, environ), daemon=True)
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    answers = [_answer(receiver) for receiver in receivers]
    for process in processes:
        process.join(10)
    if errors := [a["error"] for a in answers if "error" in a]:
        raise AssertionError("\n".join(errors))
    return [a["result"] for a in answers]


def _answer(receiver: Any) -> dict[str, Any]:
    if not receiver.poll(60):
        return {"error": "a rank did not answer in 60 s"}
    try:
        return json.loads(receiver.recv_bytes())
    except EOFError:
        return {"error": "a rank died"}


def _rank(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], environ: dict[str, str]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environ)
    try:
        answer = {"result": work(*arguments)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    sender.send_bytes(json.dumps(answer).encode())
    os._exit(0)


def losses(root: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(RunPaths(root).metrics) if "loss" in line]
