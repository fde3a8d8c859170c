"""Where the time of a start went, from the ledger to the line of `hpcft status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpcft.cli.status import command
from hpcft.launch.startup import startup_of
from hpcft.run.ledger import Event
from hpcft.run.paths import RunPaths

PHASES = {"python": 0.2, "imports": 3.1, "process group": 0.4, "model": 0.3, "weights": 6.0, "first step": 2.0}


def event(time: float, event: str, attempt: int = 1, restart: int = 0, **facts: Any) -> Event:
    return {"time": time, "event": event, "attempt": attempt, "job": "7", "restart": restart, **facts}


def start(at: float, attempt: int = 1, restart: int = 0, phases: dict[str, float] = PHASES) -> list[Event]:
    """An attempt on Slurm: two seconds of setup, half a second of preflight, and as much for srun."""
    found = [
        event(at, "attempt_began", attempt, restart, nodes=["n1"], job_began=at - 2.0),
        event(at + 0.5, "preflight", attempt, restart, ok=True),
    ]
    now = at + 1.0
    for name, seconds in phases.items():
        now += seconds
        found.append(event(now, "phase", attempt, restart, rank=0, name=name, seconds=seconds))
        found.append(event(now, "phase", attempt, restart, rank=1, name=name, seconds=seconds * 2))
    return found


def test_a_start_is_shown_from_the_job_to_the_first_step() -> None:
    found = startup_of(start(100.0), 1)
    assert found is not None
    assert found.over
    assert found.words() == (
        "15.0 s (job 2.0, preflight 0.5, launch 0.5, python 0.2, imports 3.1, process group 0.4, model 0.3, "
        "weights 6.0, first step 2.0)"
    )


def test_an_attempt_in_the_same_allocation_does_not_count_the_job_again_and_a_restart_does() -> None:
    events = [*start(100.0), *start(200.0, 2), *start(300.0, 3, restart=1)]
    seconds = [found.seconds for number in (1, 2, 3) if (found := startup_of(events, number))]
    assert seconds == pytest.approx([15.0, 13.0, 15.0])


def test_a_start_that_goes_on_says_how_far_it_is() -> None:
    found = startup_of(start(100.0, phases={"python": 0.2, "imports": 3.1}), 1)
    assert found is not None
    assert not found.over
    assert found.words().startswith("6.3 s so far (job 2.0")


def test_nothing_is_said_of_a_start_that_nothing_is_known_of() -> None:
    assert startup_of([], 1) is None
    assert startup_of([event(1.0, "attempt_began")], 1) is None
    assert startup_of(start(100.0), 2) is None


def test_status_shows_the_last_attempts_start(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.events.mkdir()
    paths.script.touch()
    ended = event(400.0, "attempt_ended", 2, decision="stop", ending="failed", why="so it is")
    lines = [*start(100.0), *start(300.0, 2), ended]
    (paths.events / "events-batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = CliRunner().invoke(command, [str(tmp_path)])
    assert page.exit_code == 0, page.output
    assert "start       13.0 s (preflight 0.5, launch 0.5, python 0.2, imports 3.1" in page.output
    told = json.loads(CliRunner().invoke(command, [str(tmp_path), "--json"]).output)
    assert [attempt["startup"]["seconds"] for attempt in told["attempts"]] == pytest.approx([15.0, 13.0])
