"""``hpcft`` as somebody runs it to whom a closed folder is closed, root included."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.words import ROOT

DROP_FROM_BOUNDS, PAST_RIGHTS = 24, (1, 2)  # prctl's word, and what lets root read and write everything
LIBC = ctypes.CDLL(None)


def by_mode(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What came of ``hpcft LINE`` in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "hpcft.cli.main", *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=bound_by_rights,
    )


def bound_by_rights() -> None:
    """After the next exec root has no more rights to files than their owner; of no effect for others."""
    for capability in PAST_RIGHTS:
        LIBC.prctl(DROP_FROM_BOUNDS, capability, 0, 0, 0)
