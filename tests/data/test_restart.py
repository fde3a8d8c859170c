"""A prepare that is killed goes on where it ended: the same bytes, nothing finished done twice, nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpcft.data import pool, portions
from hpcft.data.pool import Desk, Workers
from hpcft.data.prepare import main, prepare
from hpcft.data.work import Killed, Result, Work
from hpcft.errors import Refusal
from hpcft.plan.plan import DataPlan
from tests.data.conftest import Tokenizers
from tests.data.small import chat, request, write_lines
from tests.plans import plan

ROWS = [chat(f"what is {n} ?", "the answer is " + "and two " * (n % 40) + str(n)) for n in range(3000)]
NAMED = ("locks", "requests")


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizers) -> DataPlan:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    return request(path, tokenizer=tokenizer(), max_length=512, validation_ratio=0.05)


def files(folder: Path) -> dict[str, bytes]:
    """All but the picture, which only the command draws."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".png"}


def results(store: Path) -> dict[str, int]:
    """The finished portions in the work area → the moment each was written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("work/*/*.npz")}


def haltingly(data: DataPlan, store: Path, results: int, tells: Any) -> None:
    """``prepare`` in a process of its own that tells of its so-manieth result and makes no more than three others."""
    save, made = Work.save, 0

    def counted(self: Work, name: str, result: Any) -> None:
        nonlocal made
        made += 1
        while made > results + 3:
            signal.pause()
        time.sleep(0.02)
        save(self, name, result)
        if made == results:
            tells.send_bytes(b"made")

    Work.save = counted  # type: ignore[method-assign]
    if not results:
        tells.send_bytes(b"begun")
    prepare(data, store)


def killed(data: DataPlan, store: Path, results: int, seconds: float) -> bool:
    """Whether a prepare that was SIGKILLed so many seconds after so many results had not ended by itself."""
    context = multiprocessing.get_context("fork")
    told, tells = context.Pipe(duplex=False)
    process = context.Process(target=haltingly, args=(data, store, results, tells))
    process.start()
    tells.close()
    with contextlib.suppress(EOFError):  # it ended before there were so many
        told.recv_bytes()
        process.join(seconds)
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


# A prepare that keeps no portion after its first tokenised one while the file ``held`` stands beside this program.
HELD = """
import runpy, time
from pathlib import Path
from hpcft.data.work import Work
save = Work.save
def held(work, name, result):
    while name.startswith("read-") and list(work.folder.glob("read-*")) and Path(__file__).with_name("held").exists():
        time.sleep(0.01)
    save(work, name, result)
Work.save = held  # in the workers too, which import this file
if __name__ == "__main__":
    runpy.run_module("hpcft.data.prepare", run_name="__main__")
"""


def started(data: DataPlan, folder: Path, store: Path) -> subprocess.Popen[str]:
    """A prepare of two workers that has tokenised its first portion, and keeps no other while ``held`` is there."""
    (folder / "plan.json").write_text(plan(data=data).to_json())
    (folder / "program.py").write_text(HELD)
    (folder / "held").touch()
    words = ["--plan", str(folder / "plan.json"), "--store", str(store), "--workers", "2"]
    command = [sys.executable, str(folder / "program.py"), *words]
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(store.glob("work/*/read-*.npz")):
        assert time.monotonic() < end, "no portion was ever finished"
        assert process.poll() is None, "it ended before any portion was finished"
        time.sleep(0.01)
    return process


def test_kills_at_random_moments_cost_no_finished_portion_and_no_byte(data: DataPlan, tmp_path: Path) -> None:
    whole, store = files(prepare(data, tmp_path / "undisturbed").folder), tmp_path / "store"
    draw, landed, before = random.Random(4), 0, dict[str, int]()
    while killed(data, store, draw.randrange(8), draw.uniform(0, 0.1)):
        now = results(store)
        assert now.items() >= before.items(), "a finished portion was lost or done again"
        landed += len(now) > len(before)
        before = now
    assert landed >= 3, "too few kills hit the middle of the work"
    assert files(prepare(data, store).folder) == whole
    assert {path.name for path in store.iterdir()} - set(NAMED) == {prepare(data, store).content}


def test_a_killed_prepare_leaves_no_worker_and_another_number_of_workers_goes_on(
    data: DataPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    process = started(data, tmp_path, store)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(tree) >= 3, "no workers were there to outlive it"
    assert psutil.wait_procs(tree, timeout=60)[1] == []
    done = len(results(store))
    assert main(["--plan", str(tmp_path / "plan.json"), "--store", str(store)]) == 0
    assert f"went on where an earlier prepare ended: {done} of" in capsys.readouterr().err
    assert files(prepare(data, store).folder) == files(prepare(data, tmp_path / "undisturbed").folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_result_is_noticed_and_done_again(damage: str, data: DataPlan, tmp_path: Path) -> None:
    whole, store = files(prepare(data, tmp_path / "undisturbed").folder), tmp_path / "store"
    assert killed(data, store, 3, 0.0)
    torn = max(store.glob("work/*/*.npz"), key=lambda path: path.stat().st_size)
    content = bytearray(torn.read_bytes())
    content[len(content) // 2] ^= 1
    torn.write_bytes({"cut": bytes(content[:-100]), "flip": bytes(content), "empty": b""}[damage])
    assert files(prepare(data, store).folder) == whole


def test_a_prepare_that_is_asked_to_end_gives_its_lock_back_and_keeps_its_work(data: DataPlan, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = started(data, tmp_path, store)
    process.terminate()
    (tmp_path / "held").unlink()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "what is finished is kept" in said
    assert "Traceback" not in said
    assert list((store / "locks").iterdir()) == []
    assert results(store)


def test_data_is_prepared_though_the_disk_of_the_log_is_full(data: DataPlan, tmp_path: Path) -> None:
    process = started(data, tmp_path, tmp_path / "store")
    process.kill()
    process.communicate()  # so that there is something to say
    words = ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]
    command = [sys.executable, "-m", "hpcft.data.prepare", *words]
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=full).returncode == 0


def test_what_was_refused_leaves_no_work_behind(data: DataPlan, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(Refusal, match=r"rows\.jsonl:3001: broken JSON"):
        prepare(data, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["locks"]


def test_a_worker_killed_from_outside_is_told_as_such_and_its_work_is_kept(data: DataPlan, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = started(data, tmp_path, store)
    server = next(p for p in psutil.Process(process.pid).children() if p.children())
    server.children()[0].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "a worker process was killed from outside" in said
    assert "Traceback" not in said
    assert results(store)


@dataclass(frozen=True)
class Empty:
    """A task without work. It is its own piece and cut, of a file that stays as it is."""

    name: str
    seconds: float = 0.0

    @property
    def piece(self) -> Any:
        return self

    cut = piece

    def still(self) -> None: ...

    def do(self, desk: Desk) -> Result:
        time.sleep(self.seconds)
        return {}, {}


@dataclass(frozen=True)
class Cut(Empty):
    """A task whose file ends too early."""

    def do(self, desk: Desk) -> Result:
        raise EOFError("this file was cut off")


def test_what_a_portion_meets_itself_is_not_taken_for_a_killed_worker(data: DataPlan, tmp_path: Path) -> None:
    said = told_in_time([Cut("first")], data, tmp_path)
    assert said == "EOFError: this file was cut off"


def test_a_worker_killed_between_two_portions_is_told_when_the_next_one_is_handed_out(
    data: DataPlan, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    work = Work(tmp_path / "store", "content")
    before = threading.active_count()

    def tasks() -> Iterator[Empty]:
        yield Empty("first")
        for process in multiprocessing.active_children():
            process.kill()
        end = time.monotonic() + 60
        while threading.active_count() > before:  # the pool has not noticed it yet
            assert time.monotonic() < end
            time.sleep(0.01)
        yield Empty("second")

    workers = Workers(Desk(dataclasses.replace(data, workers=2), tmp_path, work))
    with work.kept(), workers, pytest.raises(Killed, match="killed from outside"):
        list(workers.results(tasks()))


def while_a_second_is_started(before: bool) -> Callable[[ProcessPoolExecutor], None]:
    """In place of what starts a worker: of two the first is killed, and the pool notices, before or after the start."""
    spawn: Any = getattr(ProcessPoolExecutor, "_spawn_process")  # noqa: B009  typeshed does not know it

    class Later:
        """Takes a started worker to where the pool keeps them, when the pool has broken."""

        def __init__(self, pool: ProcessPoolExecutor) -> None:
            self.pool, self.kept = pool, pool._processes

        def broken(self) -> None:
            for process in self.kept.values():
                process.kill()
            end = time.monotonic() + 60
            while not self.pool._broken:
                assert time.monotonic() < end, "the pool never noticed"
                time.sleep(0.01)
            time.sleep(0.5)  # for what it does then

        def __setitem__(self, number: int, process: Any) -> None:
            self.broken()
            self.kept[number] = process

    def started(pool: ProcessPoolExecutor) -> None:
        if not (kept := pool._processes):
            return spawn(pool)
        later = Later(pool)
        if before:
            later.broken()
            return spawn(pool)
        pool._processes = later  # type: ignore[assignment]
        try:
            return spawn(pool)
        finally:
            pool._processes = kept

    return started


def told_in_time(tasks: Iterable[Empty], data: DataPlan, folder: Path) -> str:
    """What two workers' ``tasks`` came to, "hangs" where that is nothing in a minute."""
    (folder / "store").mkdir()
    workers, said = Workers(Desk(dataclasses.replace(data, workers=2), folder, Work(folder / "store", "content"))), []

    def work() -> None:
        try:
            with workers.desk.work.kept(), workers:
                list(workers.results(tasks))
        except BaseException as error:
            said.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    for process in multiprocessing.active_children():
        process.kill()
    return said[0] if said else "hangs"


@pytest.mark.parametrize("before", [True, False])
def test_a_worker_killed_while_another_is_started_is_told_as_such_and_nothing_waits_for_the_other(
    before: bool, data: DataPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", while_a_second_is_started(before))
    said = told_in_time([Empty("first", 1), Empty("second", 1)], data, tmp_path)
    assert said.startswith("Killed: a worker process was killed from outside"), said


def test_a_portion_handed_out_in_the_moment_in_which_the_pool_breaks_is_not_waited_for(
    data: DataPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.1)
    submit = ProcessPoolExecutor.submit

    def lost(self: ProcessPoolExecutor, *words: Any) -> Future[Any]:
        future = submit(self, *words)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(BrokenProcessPool):
            future.result(60)
        return Future()  # as one that the pool did not know of when it told the others

    monkeypatch.setattr(ProcessPoolExecutor, "submit", lost)
    said = told_in_time([Empty("first", 1)], data, tmp_path)
    assert said.startswith("Killed: a worker process was killed from outside"), said


def test_the_server_of_the_workers_killed_before_the_first_is_there_is_told_as_such(
    data: DataPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Any = forkserver._forkserver

    def killed(descriptors: Any) -> Any:
        server.ensure_running()
        os.kill(server._forkserver_pid, signal.SIGSTOP)
        answer = server.connect_to_new_process(descriptors)
        os.kill(server._forkserver_pid, signal.SIGKILL)
        return answer

    monkeypatch.setattr(forkserver, "connect_to_new_process", killed)
    said = told_in_time([Empty("first")], data, tmp_path)
    assert said.startswith("Killed: a worker process was killed from outside"), said


def test_the_first_fault_in_the_file_is_told_whatever_portion_it_is_in(data: DataPlan, tmp_path: Path) -> None:
    rows = [*ROWS]
    for at in (1200, 2400):
        rows[at] = {"messages": [{"role": "nobody", "content": "x"}]}
    write_lines(tmp_path / "rows.jsonl", rows)
    for workers in (1, 2):
        with pytest.raises(Refusal, match=r"rows\.jsonl:1201: turn 1 has the unknown role"):
            main_with(data, tmp_path, workers)


def main_with(data: DataPlan, folder: Path, workers: int) -> None:
    prepare(dataclasses.replace(data, workers=workers), folder / f"store-{workers}")


def cuts(content: bytes, path: Path) -> Iterator[portions.Portion]:
    from hpcft.data.sources import DataFile

    path.write_bytes(content)
    yield from portions.cut(DataFile(path, path.name)).portions or ()


def test_portions_hold_every_line_once_and_know_its_number(tmp_path: Path) -> None:
    draw = random.Random(5)
    lines = [b'"' + b"x" * draw.choice((0, 10, 3000, 90_000)) + b'"' for _ in range(200)]
    for end in (b"", b"\n", b"\n\n\n"):
        content = b"\n".join(lines) + end
        found = list(cuts(content, tmp_path / "lines.jsonl"))
        assert len(found) > 20
        assert b"".join(content[portion.start : portion.end] for portion in found) == content
        assert [portion.line for portion in found] == [1 + content[: portion.start].count(b"\n") for portion in found]
        assert all(content[: portion.start].endswith(b"\n") for portion in found[1:])
