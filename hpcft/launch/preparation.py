"""The job that prepares a run's data, as whoever asks for the run sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.launch.prepare import BEGAN, FAILED, PREPARED
from hpcft.launch.submissions import LIVES
from hpcft.run.ledger import Event
from hpcft.run.paths import RunPaths
from hpcft.slurm.job import job_state
from hpcft.slurm.states import State

WAITS = "waits_for_preparation"
ENDINGS = {
    State.TIMEOUT: "it reached its time limit (prepare_job.time); submitted again it goes on where it was",
    State.OUT_OF_MEMORY: "it was out of memory (prepare_job.mem); submitted again it goes on where it was",
    State.CANCELLED: "its job was cancelled",
    State.FORGOTTEN: "it ended without a word",
}


@dataclass(frozen=True)
class Preparation:
    """The job that prepares. state: its own; failed: why there will be no data, "" where nothing is wrong."""

    job: str
    state: State
    failed: str
    log: Path

    @property
    def alive(self) -> bool:
        return self.state.alive


def waiting(events: Sequence[Event], job: str | None) -> Event | None:
    """The word that ``job`` waits for a preparation; None where it does not, or has begun."""
    begun = any(event["job"] == job and event["event"] in LIVES for event in events)
    words = (event for event in reversed(events) if event["event"] == WAITS and event["job"] == job)
    return None if begun else next(words, None)


def preparation(
    paths: RunPaths, events: Sequence[Event], job: str | None, ask: Callable[[str], State] | None = None
) -> Preparation | None:
    """What ``job`` waits for; None where it waits for nothing, or where the data is there by now.

    ask: the state of a job, where it was asked for already.
    """
    waits = waiting(events, job)
    if waits is None:
        return None
    number = str(waits["preparation"])
    mine = [event for event in events if event["job"] == number and event["event"] in (BEGAN, PREPARED, FAILED)]
    told = mine[-1] if mine else {"event": BEGAN}
    if told["event"] == PREPARED:
        return None
    state = State.FAILED if told["event"] == FAILED else (ask or job_state)(number)
    if state is State.COMPLETED:
        return None
    ended = not state.alive and state is not State.UNKNOWN
    why = str(told.get("why") or ENDINGS.get(state, f"it ended as {state.name.lower()}")) if ended else ""
    return Preparation(number, state, why, log_of(paths, number, waits))


def newest(paths: RunPaths, events: Sequence[Event]) -> Path | None:
    """The log of the run's newest preparation; None where there was none."""
    waits = next((event for event in reversed(events) if event["event"] == WAITS), None)
    return log_of(paths, str(waits["preparation"]), waits) if waits else None


def log_of(paths: RunPaths, number: str, waits: Event) -> Path:
    """The preparation's own log or, where it did not come so far, the batch script's."""
    own = paths.prepare_log(number)
    return own if own.exists() else Path(str(waits["batch_log"]))
