"""Each cause of a signal has its road, and the ranks take it together."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcft.run import ledger
from hpcft.run.ledger import read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.cause import Cause
from hpcft.train import stopping
from hpcft.train.checkpoint import Store
from hpcft.train.main import stop_seconds
from hpcft.train.signals import EXIT_HUNG, Signals
from tests.train import small

OPTIONS: dict[str, Any] = {"optim": {"max_steps": 4}, "checkpoint": {"save_steps": 0}}
PREPARED = small.Prepared(small.windows(8))


def term_at_2(step: int, signals: Any, run: Any) -> None:
    if step == 2 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def stopped_by(cause: Cause, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Two ranks told to stop at step 2, Slurm answering ``cause``; what they came to, and the requeues asked for."""
    asked = root / "requeues"
    monkeypatch.setattr(stopping, "why_signalled", lambda *about: cause)
    monkeypatch.setattr(stopping, "requeue", lambda *about: asked.write_text(f"{os.environ['RANK']}\n") > 0)
    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), root, PREPARED, term_at_2)
    return results, asked.read_text().split() if asked.exists() else []


def saved(root: Path) -> list[tuple[int, str]]:
    return [(e["step"], e["reason"]) for e in read_events(RunPaths(root)) if e["event"] == "saved"]


@pytest.mark.parametrize("cause", [Cause.PREEMPTED, Cause.TIME_LIMIT])
def test_a_preempted_run_saves_and_is_requeued_once_by_rank_0(
    cause: Cause, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, requeues = stopped_by(cause, tmp_path, model, monkeypatch)
    assert [r["finished"] for r in results] == [False, False]
    assert saved(tmp_path) == [(2, "stop")]
    assert requeues == ["0"]
    events = [e["event"] for e in read_events(RunPaths(tmp_path))]
    assert events.index("stopping") < events.index("saved") < events.index("requeued")


def test_a_preempted_run_whose_ledger_is_full_saves_and_is_requeued_all_the_same(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ledger._append

    def full(path: os.PathLike[str], text: str) -> None:
        if json.loads(text)["event"] in ("stopping", "requeued"):
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, text)

    monkeypatch.setattr(ledger, "_append", full)
    results, requeues = stopped_by(Cause.PREEMPTED, tmp_path, model, monkeypatch)
    assert [r["finished"] for r in results] == [False, False]
    assert saved(tmp_path) == [(2, "stop")]
    assert requeues == ["0"]


def on_rank_0(root: Path) -> stopping.Stopping:
    first: Any = SimpleNamespace(first=True)
    return stopping.Stopping(Signals(), first, RunPaths(root), ledger.Ledger(RunPaths(root), "x"), {}, 60)


def test_a_file_server_that_fails_for_a_moment_asks_for_no_save_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = on_rank_0(tmp_path)
    look = os.stat

    def failing(path: Any, **words: Any) -> os.stat_result:
        if str(path).endswith("save-now"):
            raise OSError(errno.EIO, "Input/output error", path)
        return look(path, **words)

    monkeypatch.setattr(os, "stat", failing)
    assert stops.flags() == [0.0, 0.0]
    stops.saved()


def test_a_save_now_that_cannot_be_removed_asks_for_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops, asked = on_rank_0(tmp_path), list[float]()
    stops.paths.save_now.touch()

    def full(path: Path, **words: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", full)
    for _ in range(3):
        monkeypatch.setattr(stops, "_looked_at", float("-inf"))
        asked.append(stops.flags()[1])
        if asked[-1]:
            stops.saved()
    assert asked == [1.0, 0.0, 0.0]
    os.utime(stops.paths.save_now, ns=(1, 1))  # asked for once more
    monkeypatch.setattr(stops, "_looked_at", float("-inf"))
    assert stops.flags()[1] == 1.0


@pytest.mark.parametrize("cause", [Cause.CANCELLED, Cause.REQUEUED, Cause.UNKNOWN, Cause.NOT_SLURM])
def test_nothing_else_is_requeued(cause: Cause, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, requeues = stopped_by(cause, tmp_path, model, monkeypatch)
    assert [r["finished"] for r in results] == [False, False]
    assert saved(tmp_path) == [(2, "stop")]
    assert requeues == []


@pytest.mark.parametrize("then", [Cause.CANCELLED, Cause.UNKNOWN, Cause.REQUEUED])
def test_a_job_cancelled_while_it_saves_is_not_requeued(
    then: Cause, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, requeues = Store.publish, tmp_path / "requeues"

    def cancelled_meanwhile(*arguments: Any) -> Path:
        monkeypatch.setattr(stopping, "why_signalled", lambda *about: then)
        return save(*arguments)

    monkeypatch.setattr(stopping, "why_signalled", lambda *about: Cause.PREEMPTED)
    monkeypatch.setattr(stopping, "requeue", lambda *about: requeues.write_text("0") > 0)
    monkeypatch.setattr(Store, "publish", cancelled_meanwhile)
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED, term_at_2)
    assert saved(tmp_path) == [(2, "stop")]
    assert not requeues.exists()


def test_a_signal_by_hand_saves_and_the_run_goes_on_and_hears_the_next_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, requeues = stopped_by(Cause.BY_HAND, tmp_path, model, monkeypatch)
    assert [r["finished"] for r in results] == [True, True]
    assert saved(tmp_path) == [(2, "asked"), (4, "end")]
    assert requeues == []


def test_in_a_teardown_nothing_is_saved(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="PeerLost"):
        stopped_by(Cause.TEARDOWN, tmp_path, model, monkeypatch)
    assert saved(tmp_path) == []


def test_a_signal_during_loading_stops_before_the_first_step_with_nothing_to_save(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = small.assemble._resume

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return resume(*arguments)

    monkeypatch.setattr(small.assemble, "_resume", signalled)
    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED)
    assert [(r["finished"], r["progress"]["step"]) for r in results] == [(False, 0), (False, 0)]
    assert saved(tmp_path) == []


def test_a_signal_in_the_last_step_does_not_bring_a_finished_run_back(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(step: int, signals: Any, run: Any) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stopping, "why_signalled", lambda *about: Cause.PREEMPTED)
    monkeypatch.setattr(stopping, "requeue", lambda *about: pytest.fail("a finished run was requeued"))
    [result] = small.on_ranks(1, small.train_here, small.tiny(model, 1, **OPTIONS), tmp_path, PREPARED, watch)
    assert result["finished"]
    assert saved(tmp_path) == [(4, "end")]


def test_a_second_signal_changes_nothing_but_is_not_forgotten() -> None:
    signals = Signals()
    signals._on_stop(signal.SIGUSR2, None)
    seen = signals.stops
    signals._on_stop(signal.SIGTERM, None)
    assert signals.stop == "USR2"
    signals.forget_stop(seen)
    assert signals.stop == "USR2", "a stop that came meanwhile was forgotten"
    signals.forget_stop(signals.stops)
    assert signals.stop is None


def test_a_signal_between_the_look_at_the_others_and_their_forgetting_is_heard() -> None:
    class Interrupted(Signals):
        """Signalled when it has looked how many signals came."""

        came = 0

        @property
        def _stops(self) -> int:
            seen = self.came
            if self.stop == "USR2" and sys._getframe(1).f_code.co_name == "forget_stop":
                self._on_stop(signal.SIGTERM, None)
            return seen

        @_stops.setter
        def _stops(self, number: int) -> None:
            self.came = number

    signals = Interrupted()
    signals._on_stop(signal.SIGUSR2, None)
    signals.forget_stop(1)
    assert signals.stop == "TERM"


class Hurried:
    """The time, and an hour more once ``file`` is there: hours may pass in two seconds, on every rank."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def monotonic(self) -> float:
        return time.monotonic() + 3600 * self.file.exists()


@pytest.mark.parametrize("slow", ["why_signalled", "save", "requeue"])
def test_the_watchdog_waits_for_a_save_and_for_slurm(
    slow: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "later"

    def slowed(name: str, work: Any) -> Any:
        def at_its_pace(*arguments: Any) -> Any:
            if name == slow:
                time.sleep(1)  # until all that move have come to wait for this
                later.touch()
                time.sleep(2.5)  # the watchdog looks every second
            return work(*arguments)

        return at_its_pace

    def watched(step: int, signals: Any, run: Any) -> None:
        if step == 1:
            signals.watch(120.0)  # a loaded machine takes its time between two edges
        term_at_2(step, signals, run)

    monkeypatch.setattr("hpcft.train.signals.time", Hurried(later))
    monkeypatch.setattr(stopping, "why_signalled", slowed("why_signalled", lambda *about: Cause.PREEMPTED))
    monkeypatch.setattr(stopping, "requeue", slowed("requeue", lambda *about: True))
    monkeypatch.setattr(Store, "publish", slowed("save", Store.publish))
    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED, watched)
    assert [r["finished"] for r in results] == [False, False]
    assert [e["event"] for e in read_events(RunPaths(tmp_path))][-1] == "requeued"


def test_the_grace_of_a_warning_leaves_time_to_requeue_and_without_slurm_there_is_no_hurry(model: Path) -> None:
    plan = small.tiny(model, 1, resources={"signal_lead": 300}, train={"collective_timeout": 1800})
    assert stop_seconds(plan, {"SLURM_JOB_ID": "7"}) == (300, 240)
    assert stop_seconds(plan, {}) == (1800, 1800)
    assert stop_seconds(plan, {"SLURM_JOB_ID": "7", "HPCFT_STOP_SECONDS": "5"}) == (5, 5)
    short = small.tiny(model, 1, resources={"signal_lead": 60})
    assert stop_seconds(short, {"SLURM_JOB_ID": "7"}) == (60, 30)


HANG = """
import sys, time
from hpcft.train.signals import Signals
assert "torch" not in sys.modules
signals = Signals()
signals.install()
signals.watch(0.5)
print("ready", flush=True)
def the_hanging_place():
    while True:
        time.sleep(0.1)
the_hanging_place()
"""


def test_a_step_edge_that_never_comes_ends_the_process_and_says_where_it_hung() -> None:
    process = subprocess.Popen([sys.executable, "-c", HANG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_HUNG
    assert time.monotonic() - began < 60
    assert "the_hanging_place" in stderr
    assert "no step edge came" in stderr


ALONE = """
import datetime, sys, time
from hpcft.train.signals import Signals
signals = Signals()
signals.install()
import torch, torch.distributed as dist
rank = int(sys.argv[1])
hour = datetime.timedelta(hours=1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2, timeout=hour)
if rank == 1:
    time.sleep(3600)
signals.watch(*map(float, sys.argv[3:]))
print("ready", flush=True)
def the_collective():
    dist.all_reduce(torch.ones(1))
the_collective()
"""


@pytest.mark.parametrize(("number", "graces"), [(signal.SIGTERM, ("1", "60")), (signal.SIGUSR2, ("60", "1"))])
def test_a_rank_blocked_in_a_collective_whose_peer_never_comes_ends(
    number: int, graces: tuple[str, str], tmp_path: Path
) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(rank), str(tmp_path / "meeting"), *graces],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "ready\n"
        time.sleep(0.5)  # into the collective
        ranks[0].send_signal(number)
        _, stderr = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == EXIT_HUNG
    assert "the_collective" in stderr
    assert "no step edge came in 1 s" in stderr
