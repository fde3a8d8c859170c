"""A rank that waits for a signal, asks Slurm why, writes it down, and requeues its job when that is right.

``rank.py FILE [SECONDS]``: one line is added to FILE: the restart count, the signal, the cause, what requeue said.
SECONDS: what to do instead of ending (stay that long, as a rank that saves).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hpcft.slurm.cause import why_signalled
from hpcft.slurm.environment import restart_count
from hpcft.slurm.requeue import requeue

LEAD_SECONDS = 5.0

came: list[str] = []


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: came.append(signal.Signals(number).name))
    file = Path(sys.argv[1])
    file.with_name(f"{file.name}.ready-{restart_count(os.environ)}").touch()
    while not came:
        time.sleep(0.02)
    cause = why_signalled(os.environ, came[0], LEAD_SECONDS, seconds=5)
    answer = requeue(os.environ, seconds=10) if cause.requeues else None
    with file.open("a") as out:
        out.write(f"{restart_count(os.environ)} {came[0]} {cause.name} {answer}\n")
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)


if __name__ == "__main__":
    main()
