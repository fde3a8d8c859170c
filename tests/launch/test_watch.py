"""What a run's status says while it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.errors import Refusal
from hpcft.launch import transport, watch
from hpcft.run import lease
from hpcft.run.ledger import JOB_VARIABLE, Ledger
from hpcft.run.paths import RunPaths
from tests.plans import plan


@pytest.fixture
def held(tmp_path: Path) -> tuple[RunPaths, dict[str, str]]:
    """A run that this process holds, as one without Slurm does while it trains."""
    paths, environ = RunPaths(tmp_path), {JOB_VARIABLE: lease.local_job()}
    Ledger(paths, "batch", environ).write("attempt_began", restart=0)
    lease.take(paths, environ)
    return paths, environ


def test_a_cancelled_run_is_being_cancelled_until_its_job_has_let_go(held: tuple[RunPaths, dict[str, str]]) -> None:
    paths, environ = held
    assert watch.status(paths.root).state == "running"
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    now = watch.status(paths.root)
    assert (now.state, now.alive) == ("cancelling", True)
    Ledger(paths, "batch", environ).write("attempt_ended", decision="stop", ending="cancelled", why="cancelled")
    assert watch.status(paths.root).state == "cancelled"


def test_a_job_that_died_before_it_could_say_so_is_cancelled_all_the_same(
    held: tuple[RunPaths, dict[str, str]],
) -> None:
    paths, environ = held
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    lease.release(paths, environ)
    assert watch.status(paths.root).state == "cancelled"


def test_a_run_that_is_being_cancelled_says_when_it_can_be_resumed(held: tuple[RunPaths, dict[str, str]]) -> None:
    paths, environ = held
    Ledger(paths, "cancel", environ).write("cancelled", by="hpcft cancel")
    with pytest.raises(Refusal, match="has this run already") as refused:
        transport.refuse_unsubmittable(plan(), paths)
    assert "try again when this says so: hpcft status" in str(refused.value)
