"""The starter of a node's ranks: real processes that end together, and the right one is blamed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcft.launch import ranks
from hpcft.launch.ranks import Rank, describe, start, watch
from hpcft.run import ledger
from hpcft.run.paths import RunPaths
from tests.plans import layout, plan

PLAN = plan(layout=layout(2, 3))


def started(tmp_path: Path, code: str, node: int = 0) -> list[Rank]:
    environ = {**os.environ, "HPCFT_ATTEMPT": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    script = f"import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"
    return start(PLAN, RunPaths(tmp_path), environ, node, [sys.executable, "-c", script])


def ended(found: list[Rank]) -> tuple[int, list[tuple[int, int]]]:
    blamed: list[tuple[int, int]] = []
    return watch(found, lambda rank, code: blamed.append((rank.rank, code))), blamed


def test_ranks_get_torchruns_variables_and_a_log_each(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"]
    found = started(tmp_path, f"print(json.dumps([os.environ[name] for name in {names}]))", node=1)
    assert ended(found) == (0, [])
    for local, rank in enumerate((3, 4, 5)):
        log = RunPaths(tmp_path).rank_log(1, rank)
        assert json.loads(log.read_text()) == [str(rank), str(local), "6", "3", "1"]
        assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("devices", [None, "", "2,3"])
def test_the_users_choice_of_devices_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    ended(started(tmp_path, "print(os.environ.get('CUDA_VISIBLE_DEVICES'), end='')"))
    assert RunPaths(tmp_path).rank_log(1, 0).read_text() == str(devices)


def test_the_first_rank_that_dies_is_blamed_and_takes_the_others_along(tmp_path: Path) -> None:
    code = "time.sleep(0.3)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    began = time.monotonic()
    assert ended(started(tmp_path, code)) == (137, [(1, 137)])
    assert time.monotonic() - began < 60


def test_a_rank_that_dies_of_a_full_disk_takes_the_others_along_though_nobody_can_write_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ledger, "_append", full)
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nopen(f'ready-{rank}', 'w')\ntime.sleep(60)"
    dies = "while not all(os.path.exists(f'ready-{n}') for n in (0, 2)): time.sleep(0.05)\n    sys.exit(1)"
    monkeypatch.chdir(tmp_path)
    found = started(tmp_path, f"if rank == 1:\n    {dies}\n{waits}")
    assert watch(found, ranks.record_death(RunPaths(tmp_path), {"HPCFT_ATTEMPT": "1"}, "n1")) == 1
    assert [rank.code() for rank in found] == [75, 1, 75]


def test_a_rank_whose_watcher_was_killed_before_it_could_ask_to_die_with_it_ends() -> None:
    begins = "import sys; from hpcft.launch import ranks; ranks._die_with(int(sys.argv[1]))"
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    for parent, code in ((os.getpid(), 0), (os.getppid(), 137)):
        assert subprocess.run([sys.executable, "-c", begins, str(parent)], env=environ).returncode == code


def test_a_rank_that_ignores_the_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0.5)\nif rank == 2: sys.exit(3)\ntime.sleep(60)"
    assert ended(started(tmp_path, code)) == (3, [(2, 3)])


def test_ranks_that_stop_on_purpose_are_no_failure(tmp_path: Path) -> None:
    assert ended(started(tmp_path, "time.sleep(rank / 10); sys.exit(75)")) == (75, [])


def test_a_rank_that_outlives_a_finished_one_for_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LATE_SECONDS", 0.5)
    code, blamed = ended(started(tmp_path, "if rank == 1: time.sleep(60)"))
    assert code == 143
    assert [rank for rank, _ in blamed] in ([], [1])


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    code = (
        "heard = []\n"
        "for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _: heard.append(number))\n"
        "print('ready', flush=True)\n"
        "while len(heard) < 3: time.sleep(0.01)\n"
        "sys.exit(75)"
    )
    before = {number: signal.getsignal(number) for number in ranks.FORWARDED}
    found = started(tmp_path, code)
    ranks.forward_signals(found)
    try:
        logs = [RunPaths(tmp_path).rank_log(1, rank) for rank in range(3)]
        while not all("ready" in log.read_text() for log in logs):
            time.sleep(0.02)
        for number in ranks.FORWARDED:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert ended(found) == (75, [])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("code", "words"),
    [(137, "was killed by SIGKILL"), (1, "ended with exit code 1"), (255, "ended with exit code 255")],
)
def test_exit_codes_are_told_in_words(code: int, words: str) -> None:
    assert describe(code) == words
