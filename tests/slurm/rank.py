"""A rank that waits for a signal, asks Slurm why, writes it down, and requeues its job when that is right.

``rank.py FILE STAY LEAD``: one line is added to FILE: the restart count, the signal, the cause, what requeue said.
STAY: seconds to stay before ending, as a rank that saves. LEAD: seconds before the end for which the job asked its
warning.
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

came: list[str] = []


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: came.append(signal.Signals(number).name))
    file, stay, lead = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    file.with_name(f"{file.name}.ready-{restart_count(os.environ)}").touch()
    while not came:
        time.sleep(0.02)
    cause = why_signalled(os.environ, came[0], lead, seconds=5)
    answer = requeue(os.environ, seconds=10) if cause.requeues else None
    with file.open("a") as out:
        out.write(f"{restart_count(os.environ)} {came[0]} {cause.name} {answer}\n")
    time.sleep(stay)


if __name__ == "__main__":
    main()
