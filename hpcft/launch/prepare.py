"""Data prepared on the cluster: the Plan from the script, ``hpcft.data.prepare``, a word in the ledger.

It is the whole of a job, and its exit code is that of the preparation: the training job waits for a 0. A job that is
killed leaves no word, and whoever asks later hears of it from Slurm. With ``--in-job`` it is a job step of the training
job: the Plan is the run's, and the word is one that ``after`` decides from.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hpcft.launch.entry import run, say
from hpcft.launch.preflight import own_name
from hpcft.plan.plan import Plan
from hpcft.run.folder import make_folder
from hpcft.run.ledger import Ledger, attempt_of, job_of
from hpcft.run.paths import STORE_VARIABLE, RunPaths

POLL_SECONDS = 0.1
BEGAN, PREPARED, FAILED = "preparing", "prepared", "preparation_failed"


asked: list[int] = []  # signals that came


def prepare(text: str, paths: RunPaths, environ: Mapping[str, str], workers: int | None = None) -> int:
    """Prepare the data of the plan ``text``; the exit code. Raises Refusal where the plan cannot be read.

    workers: processes, in place of the plan's.
    """
    plan = Plan.from_json(text, where="the plan in the script")
    make_folder(paths.root)
    log = paths.prepare_log(job_of(environ) or "none")
    log.parent.mkdir(mode=0o700, exist_ok=True)
    ledger = Ledger(paths, "prepare", environ)
    ledger.write(BEGAN, log=str(log))
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file, _private(log) as stream:
        file.write(text)
        file.flush()
        words = ["--plan", file.name, "--store", environ[STORE_VARIABLE]]
        words += ["--workers", str(workers)] if workers else []
        code = _run([sys.executable, "-u", "-m", "hpcft.data.prepare", *words], stream, environ)
    if code == 0:
        ledger.write(PREPARED, log=str(log))
        say(f"the data of {plan.name} is prepared; what it is: {log}")
    elif asked or code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 128 + signal.SIGTERM  # whoever sent that may start the job anew
    else:
        asks = "slurm.mem" if attempt_of(environ) else "prepare_job.mem in the profile"
        why = cause(log) if code > 0 else f"killed by signal {-code}; for want of memory? ({asks})"
        ledger.write(FAILED, why=why, code=code, log=str(log))
        if attempt_of(environ):
            _tell_after(ledger, f"the data is not prepared: {why}; the whole log: {log}", code)
        say(f"the data of {plan.name} is not prepared: {why}; the whole log: {log}")
    return code if code >= 0 else 1


def _run(command: Sequence[str], stream: IO[str], environ: Mapping[str, str]) -> int:
    """The exit code of ``command``, which Slurm's warning before the time limit ends as a TERM does."""
    child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environ, preexec_fn=_no_warning)
    warned = False
    while (code := child.poll()) is None:
        if signal.SIGUSR2 in asked and not warned:
            warned = True
            child.terminate()
        time.sleep(POLL_SECONDS)
    return code


def _no_warning() -> None:
    """Slurm sends it to every process of a job step, and the workers would be gone before they are told to end."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _tell_after(ledger: Ledger, why: str, code: int) -> None:
    """What the data's own fault is, no other attempt mends; anything else may go well the next time."""
    if code == 2:
        ledger.write("preflight", ok=False, refused=why, bad_nodes=[])
    else:
        ledger.write("failed", node=own_name(ledger.environ), error=why, code=code)


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
    parser.add_argument("--workers", type=int)
    parser.add_argument("--in-job", action="store_true")
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: asked.append(number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks ranks to save; the preparation inherits that it is ignored
    paths = RunPaths.from_environment()
    text = paths.plan.read_text(encoding="utf-8") if given.in_job else sys.stdin.buffer.read().decode("utf-8")
    return prepare(text, paths, os.environ, given.workers)


if __name__ == "__main__":
    sys.exit(run(main))
