"""A private Slurm of several nodes on this one machine: real daemons on loopback, in one folder, on ports of their own.

Nothing outside the folder is touched and nothing on the machine is needed but the packages: munge runs with its
own key and socket, so several such clusters, and the machine's own Slurm, can be up at once. Any account can
start one (its jobs then run as that account); only installing the packages takes root. Every process is stopped
by the id it left in its pid file, or by the mark it carries in its environment; never by name.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from hpcft.slurm.environment import scrubbed
from hpcft.slurm.states import State
from tests.loopback import processes
from tests.loopback.config import TASK_PROLOG, Layout, cgroup_conf, gres_conf, slurm_conf, task_prolog

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins")
_LONGEST_FOLDER = 70  # a Unix socket's path holds 107 bytes; Slurm puts its sockets under the folder


class LoopbackSlurm:
    """The cluster in ``folder``; a context manager that brings it up and takes it down.

    gpus: pretend GPUs of each node (files named gpu0, gpu1 …; Slurm sets CUDA_VISIBLE_DEVICES), or, with
    ``real_gpus``, that many of /dev/nvidia0 … for each node in turn.
    Raises RuntimeError where Slurm is not installed or a daemon does not come up, with the end of its log.
    """

    def __init__(self, folder: Path | None = None, nodes: int = 4, gpus: int = 0, real_gpus: bool = False) -> None:
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="hpcft-slurm-"))).resolve()
        self.nodes = tuple(f"n{number + 1}" for number in range(nodes))
        self._own_folder = folder is None
        self._claim: socket.socket | None = None  # on its ports
        self._gpus = _devices(self.folder, nodes, gpus, real_gpus)
        clean = {name: value for name, value in scrubbed(os.environ).items() if not name.startswith("SLURM_")}
        self._environ = clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    @property
    def environment(self) -> dict[str, str]:
        """The environment for commands on this cluster: this process's as it was, clean of any other job or cluster."""
        return dict(self._environ)

    @property
    def is_up(self) -> bool:
        """The controller runs."""
        return self._runs("slurmctld", "slurmctld")

    def __enter__(self) -> LoopbackSlurm:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Write the configuration, start munged, slurmctld and the nodes, and wait until every node is idle."""
        if self.is_up:
            raise RuntimeError(f"{self.folder}: this cluster is up already")
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise RuntimeError(f"{self.folder}: too long for Unix sockets (at most {_LONGEST_FOLDER} letters)")
        self._clear()
        if missing := missing_programs():
            install = f"apt-get install {' '.join(PACKAGES)}"
            raise RuntimeError(f"Slurm is not installed here (no {', '.join(missing)}): {install}")
        self._write_configuration()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", ["slurmctld", "-f", str(self.folder / "slurm.conf")])
            for node in self.nodes:
                self.start_node(node)
            self._until(self._all_idle, 120, "every node idle")
        except BaseException:
            self.down(keep=True)
            raise

    def down(self, keep: bool = False) -> None:
        """Stop everything that was started here; the folder goes too when it was made for this cluster."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.cancel_all()
        daemons = [file.stem for file in sorted(self.folder.glob("slurmd-*.pid"))]
        for name in ["slurmctld", *daemons, "munged"]:
            processes.stop(self.folder / f"{name}.pid", self._mark(name.removeprefix("slurmd-")))
        for name in daemons:
            self._kill_all_of(name.removeprefix("slurmd-"))
        if self._claim is not None:
            self._claim.close()
        if self._own_folder and not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        args: Sequence[str],
        check: bool = True,
        timeout: float = 180,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on this cluster; ``environ`` is added to its environment. Raises RuntimeError with its words."""
        done = subprocess.run(
            list(args),
            env=self.environment | dict(environ or {}),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, body: str, *options: str, cwd: Path | None = None) -> str:
        """Submit a batch script of these shell lines; its log is ``job-<id>.log`` in ``cwd``. Returns the job id."""
        script = self.folder / f"job-{secrets.token_hex(4)}.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        args = ["sbatch", "--parsable", "--output=job-%j.log", *options, str(script)]
        return self.run(args, cwd=cwd).stdout.strip().partition(";")[0]

    def state(self, job_id: str) -> State:
        """The job's state as scontrol has it; FORGOTTEN where Slurm does not know it."""
        done = self.run(["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"], check=False)
        return State.parse(done.stdout) if done.stdout.strip() else State.FORGOTTEN

    def wait_for(self, job_id: str, states: State | Collection[State], seconds: float = 180) -> State:
        """Wait until the job is in one of ``states``; returns it. Raises TimeoutError with the controller's log."""
        wanted = {states} if isinstance(states, State) else set(states)
        names = ", ".join(sorted(state.name for state in wanted))
        self._until(lambda: self.state(job_id) in wanted, seconds, f"job {job_id} to be {names}", job_id)
        return self.state(job_id)

    def cancel_all(self, seconds: float = 90) -> None:
        """End every job now, its ranks without grace, and wait until none is left."""
        jobs = self.run(["squeue", "-h", "-o", "%A"], check=False, timeout=60).stdout.split() if self.is_up else []
        if not jobs:
            return
        for job_id in set(jobs):
            self.run(["scontrol", "update", f"JobId={job_id}", "Requeue=0"], check=False, timeout=60)
        self.run(["scancel", *set(jobs)], check=False, timeout=60)
        for node in self.nodes:
            processes.kill(processes.ranks_of(self.folder, node))
        self._until(lambda: not self.run(["squeue", "-h"], check=False).stdout.strip(), seconds, "an empty queue")

    def kill_node(self, node: str, ranks_too: bool = True) -> None:
        """Let a node die: its slurmd is killed and, with ``ranks_too``, everything that ran on it.

        Without ``ranks_too`` the ranks live on, as when a node loses only its network. Slurm notices after
        SlurmdTimeout (20 s) and up to as much again. ``start_node`` brings it back.
        """
        slurmd = processes.pid_in(self.folder / f"slurmd-{node}.pid") if self._runs(f"slurmd-{node}", node) else None
        processes.kill([slurmd] if slurmd else [])
        if ranks_too:
            self._kill_all_of(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(f"slurmd-{node}", node, ["slurmd", "-N", node, "-f", str(self.folder / "slurm.conf")])

    def stop_controller(self) -> None:
        """Take slurmctld away; jobs run on, and every command fails until ``start_controller``."""
        processes.stop(self.folder / "slurmctld.pid", self._mark("slurmctld"))

    def start_controller(self) -> None:
        """Bring slurmctld back with its saved state."""
        self._start("slurmctld", "slurmctld", ["slurmctld", "-f", str(self.folder / "slurm.conf")])
        self._until(lambda: "is UP" in self.run(["scontrol", "ping"], check=False).stdout, 120, "slurmctld to answer")

    def _clear(self) -> None:
        """Nothing is deleted but what an earlier private Slurm left."""
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / "slurm.conf").exists():
                raise RuntimeError(f"{self.folder}: not empty and not a private Slurm's; name another folder")
            self.down()  # what is left of a cluster that was not stopped: the machine was restarted, for example
            shutil.rmtree(self.folder)

    def _mark(self, name: str) -> str:
        return f"{self.folder}:{name}"

    def _kill_all_of(self, node: str) -> None:
        """Until nothing is left: what is just starting while its node dies must not outlive it."""

        def gone() -> bool:
            left = processes.daemons_of(self.folder, node) + processes.ranks_of(self.folder, node)
            processes.kill(left)
            return not left

        self._until(gone, 60, f"the processes of {node} to end")

    def _runs(self, name: str, mark: str) -> bool:
        pid = processes.pid_in(self.folder / f"{name}.pid")
        return pid is not None and processes.carries(pid, self._mark(mark))

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        ports, self._claim = _ports(1 + len(self.nodes))
        layout = Layout(
            folder=self.folder,
            devices=self._gpus,
            host=socket.gethostname(),
            user=getpass.getuser(),
            nodes=self.nodes,
            ports=ports,
            socket=str(self.folder / "munge.socket"),
        )
        for name, text in {
            "slurm.conf": slurm_conf(layout),
            "gres.conf": gres_conf(layout),
            "cgroup.conf": cgroup_conf(),
        }.items():
            (self.folder / name).write_text(text)
        if os.geteuid() == 0 and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            # Without systemd (a container) nobody has made the one folder that slurmd insists on.
            Path("/sys/fs/cgroup/system.slice").mkdir(exist_ok=True)
        if layout.real:
            (self.folder / TASK_PROLOG).write_text(task_prolog(layout))
            (self.folder / TASK_PROLOG).chmod(0o755)
        for number in range(layout.gpus):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")  # Slurm insists on a device

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder / f'munge.{end}'}" for option, end in files.items()]
        # --force: munge would refuse a folder that others may write to, as the system's temporary folder is.
        self._start("munged", "munged", ["munged", "--force", *options, f"--pid-file={self.folder / 'munged.pid'}"])

    def _start(self, name: str, mark: str, args: list[str]) -> None:
        """Start a daemon and wait for its pid file."""
        pid_file = self.folder / f"{name}.pid"
        pid_file.unlink(missing_ok=True)
        environ = self.environment | {processes.MARK: self._mark(mark)}
        with (self.folder / f"{name}.out").open("w") as output:
            done = subprocess.run(args, env=environ, cwd=self.folder, stdout=output, stderr=output, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"{name} did not start:\n{self._tail(name)}")
        self._until(lambda: processes.pid_in(pid_file) is not None, 60, f"{name}'s pid file")

    def _all_idle(self) -> bool:
        states = self.run(["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"], check=False).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _until(self, true: Callable[[], bool], seconds: float, what: str, job_id: str = "") -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                job = self.run(["scontrol", "show", "job", job_id], check=False).stdout if job_id else ""
                raise TimeoutError(f"waited {seconds:g} s for {what}\n{job}\n{self._tail('slurmctld')}")
            time.sleep(0.2)

    def _tail(self, name: str, lines: int = 15) -> str:
        files = [self.folder / f"{name}.out", self.folder / f"{name}.log"]
        texts = [file.read_text(errors="replace") for file in files if file.exists()]
        return "\n".join("\n".join(text.splitlines()[-lines:]) for text in texts)


def missing_programs() -> list[str]:
    """The programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """PATH with the folders of system daemons, which a user's often lacks."""
    given = os.environ.get("PATH", "").split(":")
    return ":".join(given + [folder for folder in ("/usr/sbin", "/sbin") if folder not in given])


def _devices(folder: Path, nodes: int, gpus: int, real: bool) -> tuple[tuple[str, ...], ...]:
    if not gpus:
        return ()
    pretend = tuple(str(folder / f"gpu{number}") for number in range(gpus))
    return tuple(
        tuple(f"/dev/nvidia{node * gpus + number}" for number in range(gpus)) if real else pretend
        for node in range(nodes)
    )


def _ports(count: int) -> tuple[range, socket.socket]:
    """A block of free ports below the ephemeral range and above those that runs take for their rendezvous.

    It is ours until the socket is closed: another cluster that looks before our daemons listen would find it free.
    """
    starts = list(range(30100, 32700 - count, 16))
    first = os.getpid() % len(starts)
    for start in starts[first:] + starts[:first]:
        if (claim := _claimed(start)) is None:
            continue
        if all(_free(port) for port in range(start, start + count)):
            return range(start, start + count), claim
        claim.close()
    raise RuntimeError("no block of free ports between 30100 and 32700")


def _claimed(start: int) -> socket.socket | None:
    """A name in the kernel that one process has at a time, and none once that has ended; None where another has it."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0hpcft-loopback-{start}")
    except OSError:
        claim.close()
        return None
    return claim


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
