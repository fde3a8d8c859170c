"""The logs of a run as lines: one rank's or the batch's, of one attempt or of all of them as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hpcft.errors import printable, refuse
from hpcft.launch.batchlog import batch_log
from hpcft.launch.preparation import newest
from hpcft.launch.prepare import BEGAN
from hpcft.run.ledger import read_events
from hpcft.run.paths import RunPaths

LOOK_SECONDS = 0.3


def log_files(paths: RunPaths, attempt: int | None = None) -> list[Path]:
    """The log files of an attempt (None: the newest), srun's own words among them.

    Raises Refusal where there was no such attempt.
    """
    if attempt is None and (log := _before(paths)):
        return [log]
    number = _attempt(paths, attempt)
    return sorted(path for path in paths.attempt(number).glob("*.log"))


def read(paths: RunPaths, rank: int = 0, attempt: int | None = None) -> Iterator[str]:
    """The lines of one rank's log in one attempt (None: the newest). Raises Refusal where it is not there.

    Before the first attempt they are those of the preparation or, where there is none, of the batch script.
    """
    if attempt is None and (before := _before(paths)):
        with before.open(errors="replace") as stream:
            yield from map(clean, stream)
        return
    number = _attempt(paths, attempt)
    log = paths.rank_log(number, rank)
    if not log.exists() and (data := _data_step(paths, number)):
        log = data
    if not log.exists():
        ranks = sorted(int(path.stem.removeprefix("rank-")) for path in paths.attempt(number).glob("rank-*.log"))
        raise refuse(f"attempt {number} has no log of rank {rank}", where=str(log.parent), choices=ranks)
    with log.open(errors="replace") as stream:
        for line in stream:
            yield clean(line)


def follow(
    paths: RunPaths, over: Callable[[], bool], rank: int = 0, attempt: int | None = None, look: float = LOOK_SECONDS
) -> Iterator[str]:
    """The lines of a rank's log as they are written, from attempt to attempt, until ``over`` says so.

    attempt: stay with this one. A line ``== attempt N`` stands where one begins.
    """
    number = attempt or 1
    if attempt is None and not _began(paths, number):
        yield from _preparation(paths, over, look)
    while True:
        ended = over()
        if attempt is None and not _began(paths, number):
            if ended:
                yield from _batch(paths, number)
                return
            time.sleep(look)
            continue
        yield f"== attempt {number}"
        passed = partial(_passed, paths, number, over, attempt)
        yield from _data(paths, number, passed, look)
        yield from _lines(paths.rank_log(number, rank), passed, look)
        if attempt is not None or (over() and not _began(paths, number + 1)):
            return
        number += 1


def _passed(paths: RunPaths, number: int, over: Callable[[], bool], stay: int | None) -> bool:
    """Is the run over or, unless we are to ``stay`` with an attempt, has the next one begun?"""
    return over() or (stay is None and _began(paths, number + 1))


def _before(paths: RunPaths) -> Path | None:
    """The log of what comes before the first attempt, while that is all there is of the run."""
    log = _preparing(paths) or batch_log(paths, read_events(paths))
    return log if log is not None and log.is_file() and not _began(paths, 1) else None


def _batch(paths: RunPaths, number: int) -> Iterator[str]:
    """The batch log of a run that has ended before attempt ``number`` began, where that is its first."""
    log = _before(paths)
    if number == 1 and log is not None and log != _preparing(paths):
        yield "== the batch script"
        with log.open(errors="replace") as stream:
            yield from map(clean, stream)


def _preparing(paths: RunPaths) -> Path | None:
    """The log of the preparation, while it is all that there is of the run."""
    log = newest(paths, read_events(paths))
    return log if log is not None and log.is_file() and not _began(paths, 1) else None


def _preparation(paths: RunPaths, over: Callable[[], bool], look: float) -> Iterator[str]:
    """The lines of the preparation's log, where there is one, until the first attempt begins."""

    def last() -> bool:
        return over() or _began(paths, 1)

    while (log := _preparing(paths)) is None:
        if last() or newest(paths, read_events(paths)) is None:
            return
        time.sleep(look)
    yield "== preparing the data"
    yield from _lines(log, last, look)


def _data_step(paths: RunPaths, number: int) -> Path | None:
    """The log of the preparation that is a job step of the attempt, while no rank of it has begun."""
    if any(paths.attempt(number).glob("rank-*.log")):
        return None
    told = [e["log"] for e in read_events(paths) if e["event"] == BEGAN and e["attempt"] == number]
    return Path(told[-1]) if told else None


def _data(paths: RunPaths, number: int, passed: Callable[[], bool], look: float) -> Iterator[str]:
    """The lines of that preparation, where there is one, until a rank begins."""

    def last() -> bool:
        return passed() or any(paths.attempt(number).glob("rank-*.log"))

    while (log := _data_step(paths, number)) is None:
        if last():
            return
        time.sleep(look)
    yield "== preparing the data"
    yield from _lines(log, last, look)


def _lines(log: Path, over: Callable[[], bool], look: float) -> Iterator[str]:
    """The lines of a file as they are written, until ``over`` says so; one that nothing ends comes then."""
    at, rest = 0, b""
    while True:
        last = over()  # asked before reading: what was written until then is read below
        if log.exists():
            with log.open("rb") as stream:
                stream.seek(at)
                found = stream.read()
            at += len(found)
            *whole, rest = (rest + found).split(b"\n")
            for line in whole:
                yield clean(line.decode(errors="replace"))
        if last:
            if rest:
                yield clean(rest.decode(errors="replace"))
            return
        time.sleep(look)


def clean(line: str) -> str:
    """A line without what would move the reader's cursor; of a progress bar, its last picture. Tabs stay."""
    shown = line.rstrip("\r\n").rpartition("\r")[2]
    return "\t".join(printable(part, limit=10_000) for part in shown.split("\t"))


def _began(paths: RunPaths, number: int) -> bool:
    return paths.attempt(number).is_dir()


def _attempt(paths: RunPaths, attempt: int | None) -> int:
    known = [event["attempt"] for event in read_events(paths) if event["event"] == "attempt_began"]
    if not known or (attempt is not None and attempt not in known):
        what = "nothing has run yet" if not known else f"there was no attempt {attempt}"
        raise refuse(what, where=str(paths.root), choices=known)
    return attempt or known[-1]
