"""How long an attempt took from its job's start to its first optimizer step, and what with: read from the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcft.launch.prepare import PREPARED
from hpcft.run.ledger import Event

LAST = "first step"
SHOWN_SECONDS = 0.05


@dataclass(frozen=True)
class Startup:
    """seconds: in all, so far where it is not over. stages: name and seconds, in their order; the ranks' are rank 0's.

    job: from Slurm's start of the job to the attempt (setup lines). data: its preparation, where the job does that.
    launch: from the end of that, or of the preflight, to the rank's process. Then the phases of ``hpcft.train.main``.
    """

    seconds: float
    stages: tuple[tuple[str, float], ...]
    over: bool

    def words(self) -> str:
        """``14.2 s (imports 3.1, weights 6.0, first step 2.0)``; what took no time is left out."""
        shown = [f"{name} {seconds:.1f}" for name, seconds in self.stages if seconds >= SHOWN_SECONDS]
        if (since := self.seconds - sum(seconds for _, seconds in self.stages)) >= SHOWN_SECONDS:
            shown.append(f"and {since:.1f} since")
        so_far = "" if self.over else " so far"
        return f"{self.seconds:.1f} s{so_far}" + (f" ({', '.join(shown)})" if shown else "")


def startup_of(events: Sequence[Event], attempt: int, now: float | None = None) -> Startup | None:
    """The start of ``attempt``; None where it has not begun or nothing of it is known.

    now: seconds since the epoch, of an attempt that is alive: what goes on counts too.
    """
    began = next((e for e in events if e["event"] == "attempt_began" and e["attempt"] == attempt), None)
    if began is None:
        return None
    stages = tuple(_stages(events, began))
    if not stages:
        return None
    known, over = sum(seconds for _, seconds in stages), stages[-1][0] == LAST
    if over or now is None:
        return Startup(known, stages, over)
    before = sum(seconds for name, seconds in stages if name == "job")
    return Startup(max(known, before + now - began["time"]), stages, over)


def _stages(events: Sequence[Event], began: Event) -> Iterator[tuple[str, float]]:
    at, job_began = float(began["time"]), began.get("job_began")
    if job_began and _first_of_its_start(events, began):
        yield "job", max(0.0, at - job_began)
    mine = [event for event in events if event["attempt"] == began["attempt"]]
    if (preflight := next((e for e in mine if e["event"] == "preflight"), None)) is not None:
        yield "preflight", preflight["time"] - at
        at = preflight["time"]
    if (data := next((e for e in mine if e["event"] == PREPARED), None)) is not None:
        yield "data", data["time"] - at
        at = data["time"]
    phases = [event for event in mine if event["event"] == "phase" and event.get("rank") == 0]
    if phases:
        yield "launch", max(0.0, phases[0]["time"] - phases[0]["seconds"] - at)
    yield from ((str(event["name"]), float(event["seconds"])) for event in phases)


def _first_of_its_start(events: Sequence[Event], began: Event) -> bool:
    """Is this the first attempt since Slurm started, or restarted, its job?"""
    same = [
        e
        for e in events
        if e["event"] == "attempt_began" and (e["job"], e["restart"]) == (began["job"], began["restart"])
    ]
    return same[0] is began
