"""Small real models, hand-made windows, and a few ranks as forked processes: what the trainer's tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported once here, not in every forked rank
import torch
import torch.utils.tensorboard
from transformers import Qwen2ForCausalLM  # noqa: F401

from benchmarks.ranks import held_port
from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, world
from hpcft.train.metrics import read_metrics
from hpcft.train.miniature import VOCABULARY, Prepared, Window, Windows, windows  # noqa: F401  for every test
from hpcft.train.signals import Signals
from tests import plans

torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")


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
    weights = {name: _here(p.detach()).double().flatten().tolist() for name, p in trained.items()}
    return {"finished": finished, "progress": run.progress.to_json(), "weights": weights}


def _here(parameter: Any) -> torch.Tensor:
    """This rank's part of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


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


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, attempt: int = 1) -> list[Any]:
    """``work(*arguments)`` on ``size`` forked ranks; what each returned, or raises with its traceback."""
    receivers, processes = [], []
    with held_port() as port:
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
    if not receiver.poll(180):
        return {"error": "a rank did not answer in 180 s"}
    try:
        return json.loads(receiver.recv_bytes())
    except EOFError:
        return {"error": "a rank died"}


def _rank(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], environ: dict[str, str]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environ)
    # A forked process's first use of torch's thread pool makes a new one, unguarded: a second thread may meet none.
    torch.set_num_threads(1)
    try:
        answer = {"result": work(*arguments)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    sender.send_bytes(json.dumps(answer).encode())
    os._exit(0)


def step(sharded: Any, rate: float) -> None:
    """One step with the gradients as they are."""
    sharded.step(rate, torch.ones(()), torch.ones(()))
    sharded.end_step(True)


def losses(root: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(RunPaths(root).metrics) if "loss" in line]
