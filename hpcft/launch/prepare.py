"""The whole of a job that prepares data: the Plan from the script, ``hpcft.data.prepare``, a word in the ledger.

Its exit code is that of the preparation: the training job waits for a 0. A job that is killed leaves no word, and
whoever asks later hears of it from Slurm.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hpcft.launch.entry import run, say
from hpcft.plan.plan import Plan
from hpcft.run.folder import make_folder
from hpcft.run.ledger import Ledger, job_of
from hpcft.run.paths import STORE_VARIABLE, RunPaths

BEGAN, PREPARED, FAILED = "preparing", "prepared", "preparation_failed"


def prepare(text: str, paths: RunPaths, environ: Mapping[str, str], workers: int) -> int:
    """Prepare the data of the plan ``text``; the exit code. Raises Refusal where the plan cannot be read."""
    plan = Plan.from_json(text, where="the plan in the script")
    make_folder(paths.root)
    log = paths.prepare_log(job_of(environ) or "none")
    log.parent.mkdir(mode=0o700, exist_ok=True)
    ledger = Ledger(paths, "prepare", environ)
    ledger.write(BEGAN, log=str(log))
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file, _private(log) as stream:
        file.write(text)
        file.flush()
        words = ["--plan", file.name, "--store", environ[STORE_VARIABLE], "--workers", str(workers)]
        command = [sys.executable, "-u", "-m", "hpcft.data.prepare", *words]
        code = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environ).returncode
    if code == 0:
        ledger.write(PREPARED, log=str(log))
        say(f"the data of {plan.name} is prepared; what it is: {log}")
    elif code not in (
        -signal.SIGTERM,
        128 + signal.SIGTERM,
    ):  # whoever sent that also ends this process, and may start the job anew
        why = (
            cause(log)
            if code > 0
            else f"killed by signal {-code}; for want of memory? (prepare_job.mem in the profile)"
        )
        ledger.write(FAILED, why=why, code=code, log=str(log))
        say(f"the data of {plan.name} is not prepared: {why}; the whole log: {log}")
    return code if code >= 0 else 1


def _private(log: Path) -> IO[str]:
    return open(log, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600))


def cause(log: Path) -> str:
    """The first error in a log, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"Error: ", line)]
    said = (errors or lines or ["it ended without a word"])[0 if errors else -1]
    return said.removeprefix("Error: ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpcft.launch.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True)
    given = parser.parse_args(arguments)
    return prepare(sys.stdin.buffer.read().decode("utf-8"), RunPaths.from_environment(), os.environ, given.workers)


if __name__ == "__main__":
    sys.exit(run(main))
