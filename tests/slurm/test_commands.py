"""One command: its answer, its absence, its silence."""

import pytest

from hpcft.slurm import commands
from hpcft.slurm.commands import SlurmAway, SlurmMissing, available, call, pauses
from tests.clock import Clock
from tests.loopback import LoopbackSlurm


def test_a_command_that_is_not_installed_is_missing() -> None:
    with pytest.raises(SlurmMissing, match="no-such-scontrol is not installed"):
        call(["no-such-scontrol"])


def test_a_command_that_hangs_is_given_up_and_called_away() -> None:
    with pytest.raises(SlurmAway, match=r"gave no answer in 0\.2 s"):
        call(["sleep", "20"], timeout=0.2)


def test_a_controller_that_does_not_answer_is_away_and_a_refusal_is_an_answer() -> None:
    def script(words: str) -> list[str]:
        return ["sh", "-c", f"echo '{words}' >&2; exit 1"]

    with pytest.raises(SlurmAway):
        call(script("slurm_load_jobs error: Unable to contact slurm controller (connect failure)"))
    with pytest.raises(SlurmAway):
        call(script("Unexpected message received for job 5"))
    assert call(script("Requested operation is presently disabled for job 5")).rc == 1


def test_a_persons_habits_and_time_zone_do_not_reach_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    out = call(["sh", "-c", "echo $SQUEUE_STATES-$SLURM_TIME_FORMAT-$TZ"]).out
    assert out == "-standard-UTC\n"


def test_a_dead_command_shows_its_signal() -> None:
    assert call(["sh", "-c", "kill -TERM $$"]).rc == -15


def test_tries_become_rarer_and_stop_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(commands, "time", clock)
    assert list(pauses(4, first=0.5)) == [4, 3.5, 2.5, 0.5, 0]
    assert clock.now == 4
    assert list(pauses(20, first=4, longest=8)) == [20, 16, 8, 0]
    assert list(pauses(0)) == [0]


def test_a_cluster_is_here_or_not_and_one_that_is_down_is_not_taken_for_a_laptop(
    slurm: LoopbackSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available()
    slurm.stop_controller()
    try:
        with pytest.raises(SlurmAway, match="DOWN"):
            available()
    finally:
        slurm.start_controller()
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    with pytest.raises(SlurmAway, match=r"/nowhere/slurm\.conf, which is not there"):
        available()
    monkeypatch.delenv("SLURM_CONF")
    assert not available(), "the commands are installed here, but they belong to no cluster"
    monkeypatch.setenv("PATH", "")
    assert not available()
