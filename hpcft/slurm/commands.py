"""The one door to Slurm's commands: run one, read its text, know when the controller is away."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# What Slurm's clients say when the controller, and not the request, is at fault (seen on 22.05 with slurmctld
# stopped, restarting and overloaded; "Unexpected message received" is what `scontrol requeue` says then).
_AWAY = (
    "unable to contact slurm controller",
    "unable to connect to slurm",
    "connect failure",
    "connection refused",
    "connection timed out",
    "connection failure",
    "socket timed out",
    "timed out on send/recv",
    "zero bytes were transmitted",
    "unexpected message received",
    "unexpected message recieved",
    "transport endpoint",
    "in standby mode",
    "protocol authentication error",
    "temporarily unable",
)
# The packages are installed, but no cluster is configured.
_NO_CLUSTER = ("establish a configuration source", "unable to process configuration file", "could not open/read/parse")
LONGEST_CALL_SECONDS = 60.0  # for one answer, however long the caller goes on asking
# A person's own habits (SQUEUE_STATES=RUNNING, SINFO_FORMAT=…) would filter and reshape what is read here.
_HABITS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")


@dataclass(frozen=True)
class Answer:
    """What a command said. rc: its exit status, negative when a signal ended it."""

    rc: int
    out: str
    err: str


class SlurmAway(Exception):
    """Slurm could not be asked: the controller does not answer in time. Asking again later may help."""


class SlurmMissing(SlurmAway):
    """There is no Slurm on this machine (a laptop, a container): asking again will not help."""


def call(args: Sequence[str], timeout: float = 30) -> Answer:
    """Run a Slurm command in a process session of its own and wait at most ``timeout`` seconds for it, or a minute.

    Times in its output are UTC. A request that Slurm refuses is an ordinary Answer with rc > 0.
    Raises SlurmMissing where the command is not installed or belongs to no cluster, SlurmAway where the controller
    does not answer.
    """
    timeout = min(timeout, LONGEST_CALL_SECONDS)
    named = os.environ.get("SLURM_CONF")
    if named and not os.path.exists(named):  # Slurm's commands would look for it again and again for a minute
        raise SlurmAway(f"SLURM_CONF names {named}, which is not there")
    try:
        done = subprocess.run(
            list(args),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=_environment(os.environ),
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise SlurmMissing(f"{args[0]} is not installed here") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmAway(f"{args[0]} gave no answer in {timeout:g} s") from error
    if done.returncode > 0:
        said = done.stderr.lower()
        if any(words in said for words in _NO_CLUSTER):
            raise SlurmMissing(f"{args[0]} is installed here, but no cluster is configured")
        if away(said):
            raise SlurmAway(done.stderr.strip())
    return Answer(done.returncode, done.stdout, done.stderr)


def away(said: str) -> bool:
    """Is it the controller that did not answer? A request may have reached it all the same."""
    return any(words in said.lower() for words in _AWAY)


def available() -> bool:
    """Whether this machine belongs to a Slurm cluster. Raises SlurmAway where it does and the controller is down.

    A cluster that is down must not look like a laptop: the run would start on the login node.
    """
    try:
        answer = call(["scontrol", "ping"])
    except SlurmMissing:
        return False
    if " UP" not in answer.out:
        raise SlurmAway((answer.out or answer.err).strip())
    return True


def pauses(seconds: float, first: float = 0.5, longest: float = 8.0) -> Iterator[float]:
    """Sleeps between tries, each twice as long as the one before, until ``seconds`` have passed.

    Yields the seconds left before each try; there is always a first try.
    """
    end, pause = time.monotonic() + seconds, first
    yield max(seconds, 0.0)
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, longest)
        yield max(end - time.monotonic(), 0.0)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if not name.startswith(_HABITS)}
    # UTC, because a local time in the hour when the clocks go back stands for two moments.
    return kept | {"TZ": "UTC", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
