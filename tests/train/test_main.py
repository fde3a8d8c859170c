"""A rank as a process: its exit code, its last words, its line in the ledger."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.data import shards
from hpcft.data.store import request_file
from hpcft.errors import Refusal, refuse
from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import RunPaths
from hpcft.train import assemble, loop, main, metrics
from hpcft.train.console import Console
from hpcft.train.metrics import Metrics, read_metrics
from hpcft.train.objectives import sft
from hpcft.train.strategies import ddp
from tests.plans import layout
from tests.train import small

OPTIONS: dict[str, Any] = {"optim": {"max_steps": 3}, "checkpoint": {"save_steps": 0}}
PREPARED = small.Prepared(small.windows(8))


@pytest.fixture
def root(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder for two ranks, its data at hand."""
    tmp_path.joinpath("plan.json").write_text(small.tiny(model, 2, **OPTIONS).to_json())
    monkeypatch.setattr(assemble, "open_data", lambda plan, environ: PREPARED)
    return tmp_path


def codes(root: Path, attempt: int = 1) -> list[int]:
    def rank() -> int:
        os.environ["HPCFT_RUN"] = str(root)
        return main.main()

    return small.on_ranks(2, rank, attempt=attempt)


def events(root: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_events(RunPaths(root)) if e["event"] == name]


def test_a_finished_run_exits_0_and_says_so_once(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert codes(root) == [0, 0]
    assert [e["step"] for e in events(root, "finished")] == [3]
    [started] = events(root, "started")
    assert (started["step"], started["checkpoint"], started["world"]) == (0, None, 2)
    phases = ["python", "imports", "process group", "data", "model", "weights", "strategy", "checkpoint"]
    assert list(started["phases"]) == phases
    assert capfd.readouterr().out.count("hpcft export") == 1


def test_a_finished_run_started_again_is_finished_at_once(root: Path) -> None:
    assert codes(root) == [0, 0]
    assert codes(root, attempt=2) == [0, 0]
    assert [e["checkpoint"] for e in events(root, "started")] == [None, "step-000003"]
    assert len([line for line in read_metrics(RunPaths(root).metrics) if "loss" in line]) == 3


def test_the_time_of_a_step_is_also_that_of_the_update_before_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_step = ddp.DataParallel.end_step

    def slow(sharded: Any, good: bool) -> None:
        time.sleep(0.5)
        end_step(sharded, good)

    monkeypatch.setattr(ddp.DataParallel, "end_step", slow)
    assert codes(root) == [0, 0]
    seconds = [line["step_seconds"] for line in read_metrics(RunPaths(root).metrics) if "loss" in line]
    assert min(seconds[1:]) > 0.5, "an engine steps when the numbers are known, and nothing else would wait for it"


def test_a_stopped_run_exits_75(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.optimizer_step

    def stopped(run: Any, this: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(run, this)

    monkeypatch.setattr(loop, "optimizer_step", stopped)
    assert codes(root) == [75, 75]
    [stopping] = events(root, "stopping")
    assert (stopping["cause"], stopping["step"]) == ("not_slurm", 1)


def test_a_refusal_exits_2_without_a_traceback(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def absent(plan: Any, environ: Any) -> Any:
        raise refuse("the data is not prepared", hint="hpcft prepare run.yaml")

    monkeypatch.setattr(assemble, "open_data", absent)
    assert codes(root) == [2, 2]
    text = capfd.readouterr().err
    assert "hpcft prepare" in text
    assert "Traceback" not in text
    assert [e["refused"] for e in events(root, "failed")] == [True, True]


def test_one_failing_rank_is_the_culprit_and_its_peer_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = sft.Supervised.loss

    def broken(self: Any, model: Any, batch: Any, known: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ValueError("a bad day")
        return loss(self, model, batch)

    monkeypatch.setattr(sft.Supervised, "loss", broken)
    assert codes(root) == [1, 1]
    culprits = [e for e in events(root, "failed") if not e["peer"]]
    assert [(e["rank"], e["error"]) for e in culprits] == [(1, "ValueError: a bad day")]
    assert culprits[0]["where"].startswith("test_main.py:")
    assert not culprits[0]["refused"]
    assert all(e["rank"] == 0 for e in events(root, "failed") if e["peer"])


def test_a_rank_that_cannot_write_why_it_ends_still_ends_with_its_code(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*about: Any, **facts: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open("/dev/full", "w") as full:

        def refused(*about: Any) -> None:
            monkeypatch.setattr(Ledger, "write", no_space)
            monkeypatch.setattr("sys.stderr", full)
            raise refuse("the data is not prepared", hint="hpcft prepare run.yaml")

        monkeypatch.setattr(assemble, "open_data", refused)
        assert codes(root) == [2, 2]


UNENDING = """
import runpy, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
runpy.run_module("hpcft.train.main", run_name="__main__")
"""


def test_a_failing_rank_ends_at_once_whatever_still_runs_and_whatever_cannot_be_written() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "HPCFT_RUN"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", UNENDING], stdout=full, stderr=full, env=environ, timeout=180)
    assert ended.returncode == 1


def test_out_of_memory_says_what_can_be_done() -> None:
    text = main.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert "per_device_train_batch_size" in text
    assert "gradient_checkpointing" in text
    assert "\n" not in text


def test_a_resumed_attempt_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for attempt, resumed, steps in ((1, 0, (1, 2, 3)), (2, 2, (3, 4))):
        metrics = Metrics(paths, resumed, attempt)
        for step in steps:
            metrics.write({"step": step, "loss": float(attempt)})
        metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(paths.metrics)] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_lost_attempt_that_still_writes_gives_no_step_twice(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    lost = Metrics(paths, 0, 1)
    lost.write({"step": 1, "loss": 1.0})
    mine = Metrics(paths, 1, 2)
    for step in (2, 3):
        lost.write({"step": step, "loss": 1.0})
        mine.write({"step": step, "loss": 2.0})
    lost.close()
    mine.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(paths.metrics)] == [(1, 1), (2, 2), (3, 2)]


def test_data_that_another_node_has_just_prepared_is_waited_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = tmp_path / "store", small.tiny(model, layout=layout(2, 1))
    request = request_file(store, plan.data)
    request_file(tmp_path / "elsewhere", plan.data).parent.mkdir(parents=True)
    request_file(tmp_path / "elsewhere", plan.data).write_text("{}")
    monkeypatch.setattr(shards, "open_prepared", lambda *about: request.exists())
    timer = threading.Timer(1.0, (tmp_path / "elsewhere").rename, [store])
    timer.start()
    assert assemble.open_data(plan, {"HPCFT_STORE": str(store)})
    timer.join()


def test_on_one_node_data_that_is_not_there_is_refused_at_once(tmp_path: Path, model: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Refusal, match="is not prepared"):
        assemble.open_data(small.tiny(model, 2), {"HPCFT_STORE": str(tmp_path)})
    assert time.monotonic() - began < 10


def full_disk(*about: Any) -> Any:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")


def test_a_disk_that_a_save_has_filled_ends_no_run_where_it_only_writes_its_metrics(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def add_scalar(self, *about: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    monkeypatch.setattr(metrics, "_open", full_disk)
    monkeypatch.setattr(metrics, "_board", lambda *about: Full())
    [result] = small.on_ranks(1, small.train_here, small.tiny(model, 1, **OPTIONS), tmp_path, PREPARED)
    assert result["finished"]
    assert capfd.readouterr().err.count("metrics cannot be written, the run goes on") == 1


def test_a_console_on_a_full_disk_is_silent() -> None:
    stream = full_disk()
    Console(True, 0, 9, stream).say("a line")
    with suppress(OSError):
        stream.close()


def test_what_two_attempts_wrote_into_each_other_is_no_line_of_metrics(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n1\n{"step": 3, "loss": 3.0}\n')
    assert [line["step"] for line in read_metrics(paths.metrics)] == [1, 3]


def test_a_torn_last_line_of_metrics_is_passed_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.write_text('{"resumed_at": 0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = Metrics(paths, 1, 2)
    metrics.write({"step": 2, "loss": 2.0})
    metrics.close()
    assert [line["step"] for line in read_metrics(paths.metrics)] == [1, 2]
