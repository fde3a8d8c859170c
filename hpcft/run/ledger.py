"""The ledger of a run: what happened, one JSON line per event, one file per writer.

Appending is not atomic on NFS, so no two processes ever write the same file; readers merge by time. A line
that was cut short by a kill is passed over, and the next line of that writer starts on a line of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from hpcft import disk
from hpcft.run.paths import RunPaths
from hpcft.slurm.environment import own_job_id, restart_count

ATTEMPT_VARIABLE = "HPCFT_ATTEMPT"
JOB_VARIABLE = "HPCFT_JOB"

Event = dict[str, Any]


def job_of(environ: Mapping[str, str]) -> str | None:
    """Slurm's job id (``12_3`` in an array), or the name a run without Slurm goes by; None outside a job."""
    return environ.get(JOB_VARIABLE) or own_job_id(environ)


def attempt_of(environ: Mapping[str, str]) -> int:
    """The number of this attempt, from 1; 0 before one has begun."""
    return int(environ.get(ATTEMPT_VARIABLE) or 0)


class Ledger:
    """The pen of one writer: ``batch``, ``rank-0000`` …; attempt, job and restart come from ``environ``."""

    def __init__(self, paths: RunPaths, writer: str, environ: Mapping[str, str] | None = None) -> None:
        self.paths = paths
        self.path = paths.events / f"events-{writer}.jsonl"
        self.environ = os.environ if environ is None else environ

    def write(self, event: str, **facts: Any) -> Event:
        """Append one event and wait until it is on disk. Raises OSError where it cannot be written."""
        line: Event = {
            "time": time.time(),
            "event": event,
            "attempt": attempt_of(self.environ),
            "job": job_of(self.environ),
            "restart": restart_count(self.environ),
            **facts,
        }
        self.paths.events.mkdir(mode=0o700, parents=True, exist_ok=True)
        with disk.named(self.path):
            _append(self.path, json.dumps(line, ensure_ascii=False, default=str) + "\n")
        return line


def _append(path: os.PathLike[str], text: str) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if _torn(file):
            text = "\n" + text
        left = text.encode()
        while left:  # a disk that is nearly full takes a part of it, and says so at the next write only
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)


def _torn(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def read_events(paths: RunPaths) -> list[Event]:
    """All events of the run, oldest first; [] where there are none yet. Lines that are not whole are left out."""
    events = [event for path in sorted(paths.events.glob("events-*.jsonl")) for event in _events_of(path.read_bytes())]
    return sorted(events, key=lambda event: event["time"])


def is_finished(paths: RunPaths) -> bool:
    """Has the last optimizer step been made and saved?"""
    return any(event["event"] == "finished" for event in read_events(paths))


def _events_of(content: bytes) -> list[Event]:
    events: list[Event] = []
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "event" in event:
            events.append(event)
    return events
