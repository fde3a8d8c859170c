"""The private Slurm's processes: found by the mark in their environment, stopped by their id."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MARK = "HPCFT_LOOPBACK"  # "<folder>:<node>", given to every daemon and inherited by the step daemons


def pid_in(file: Path) -> int | None:
    """The process id in a pid file; None where there is none."""
    try:
        return int(file.read_text().strip())
    except (OSError, ValueError):
        return None


def carries(pid: int, mark: str) -> bool:
    """Whether the process lives and is a daemon of the cluster or node ``mark``."""
    return f"{MARK}={mark}".encode() in _environment(pid)


def daemons_of(folder: Path, node: str) -> list[int]:
    """The slurmd of a node and its step daemons."""
    return [pid for pid in _every() if carries(pid, f"{folder}:{node}")]


def ranks_of(folder: Path, node: str) -> list[int]:
    """Everything that jobs started on a node: batch shells, ranks and their children."""
    started = {f"SLURM_CONF={folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
    return [pid for pid in _every() if started <= set(_environment(pid).split(b"\0"))]


def stop(pid_file: Path, mark: str) -> None:
    """TERM to the daemon that wrote the file, KILL after a minute; never another process with its number."""
    pid = pid_in(pid_file)
    for number, seconds in ((signal.SIGTERM, 60.0), (signal.SIGKILL, 10.0)):
        if pid is None or not carries(pid, mark):
            break
        kill([pid], number)
        end = time.monotonic() + seconds
        while carries(pid, mark) and time.monotonic() < end:
            time.sleep(0.05)
    pid_file.unlink(missing_ok=True)


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal these processes; one that has ended meanwhile is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _every() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _environment(pid: int) -> bytes:
    """Empty for a zombie, a kernel thread, another person's process and one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
