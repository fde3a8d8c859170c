"""``hpcft.train.verify`` started where the run would be: on this machine, in an allocation, or as a small job.

Each form waits for the end. What was found is in ``RunPaths.verified``, as far as it went.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.errors import refuse
from hpcft.launch import ranks
from hpcft.launch.entry import say
from hpcft.launch.processes import safe
from hpcft.launch.render import render
from hpcft.launch.transport import submit
from hpcft.plan.plan import Plan
from hpcft.resources import templates
from hpcft.run.expand import exported, run_folder
from hpcft.run.folder import make_folder
from hpcft.run.ledger import ATTEMPT_VARIABLE, JOB_VARIABLE
from hpcft.run.paths import RUN_VARIABLE, RunPaths
from hpcft.slurm.commands import call
from hpcft.slurm.environment import own_job_id
from hpcft.slurm.job import job_state
from hpcft.slurm.nodes import free_port, port_for
from hpcft.slurm.states import State

MINUTES = 15  # of the job, at most: imports from a slow file system are most of it
POLL_SECONDS = 2.0
TEMPLATE = "verify.sbatch.j2"


def own_plan(plan: Plan) -> Plan:
    """``plan`` as its verification is submitted: a job of its own name, short, that does not come back.

    Raises Refusal for a run of one rank.
    """
    if plan.layout.world_size == 1:
        raise refuse(
            "one rank is one process: there is nothing to compare it with",
            hint="give the ranks of the run, or two of this machine: --nproc_per_node 2",
        )
    r = plan.resources
    short = dataclasses.replace(
        r,
        job_name=f"verify-{r.job_name}",
        time_minutes=min(r.time_minutes, MINUTES),
        signal_lead=min(r.signal_lead, 60),
        requeue=False,
        extra=tuple(extra for extra in r.extra if not extra.startswith("--mail")),
    )
    return dataclasses.replace(plan, resources=short)


@contextlib.contextmanager
def folder(plan: Plan) -> Iterator[RunPaths]:
    """A folder beside the runs, where every node sees it; kept where there is no whole table, unless interrupted."""
    runs = run_folder(plan).parent
    make_folder(runs)
    paths = RunPaths(Path(tempfile.mkdtemp(prefix=f".verify-{plan.name}-", dir=runs)))
    try:
        yield paths
    except KeyboardInterrupt:
        shutil.rmtree(paths.root, ignore_errors=True)
        raise
    if all(row["verdict"] in ("ok", "absent") for row in found(paths).get("rows", [{"verdict": "failed"}])):
        shutil.rmtree(paths.root, ignore_errors=True)


def found(paths: RunPaths) -> dict[str, Any]:
    """The table as ``hpcft.train.verify`` wrote it; empty where it did not come so far."""
    try:
        table: dict[str, Any] = json.loads(paths.verified.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return table


def last_words(paths: RunPaths) -> str:
    """What srun or the first rank said last; empty where neither left a log."""
    logs = [paths.attempt(1) / "srun.log", paths.rank_log(1, 0)]
    said = [text for log in logs if log.is_file() and (text := log.read_text(errors="replace").strip())]
    return said[0].splitlines()[-1] if said else ""


def verify_here(plan: Plan, paths: RunPaths) -> int:
    """Ranks as processes of this machine; their exit code. Raises Refusal for a plan of several nodes."""
    if plan.layout.nodes != 1:
        raise refuse(f"this machine is one node, the plan has {plan.layout.nodes}", hint="slurm.nodes: 1")
    disk.replace(paths.plan, plan.to_json())
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(port_for("", 0, 1, str(paths.root))))}
    environ = {**safe(exported(plan, os.environ)), **meeting, RUN_VARIABLE: str(paths.root), ATTEMPT_VARIABLE: "1"}
    started = ranks.start(plan, paths, environ, 0, ranks.VERIFY)
    ranks.forward_signals(started)
    return ranks.watch(started, ranks.record_death(paths, environ, "this machine"))


def verify_in_allocation(plan: Plan, paths: RunPaths) -> int:
    """The script of a job, run by hand in the allocation that this process has; its exit code."""
    disk.replace(paths.script, script(plan))
    # Without its restarts: where nothing can be started, the script would put a job that has some back into the queue.
    left = (JOB_VARIABLE, ATTEMPT_VARIABLE, "SLURM_RESTART_COUNT")
    environ = {name: value for name, value in os.environ.items() if name not in left}
    environ |= {RUN_VARIABLE: str(paths.root), "SLURM_OVERLAP": "1"}  # the shell of `srun --pty` has the cores already
    environ.setdefault("SLURM_SUBMIT_DIR", os.getcwd())
    if not plan.resources.setup:
        environ.setdefault("HPCFT_PYTHON", sys.executable)
    return subprocess.run(["bash", str(paths.script)], env=environ, stdout=sys.stderr, check=False).returncode


def verify_on_slurm(plan: Plan, paths: RunPaths, told: Callable[[str], None] = say) -> int:
    """A job, waited for; 0 where Slurm says it completed. Interrupted, it cancels the job. Raises Refusal."""
    job = submit(plan, script(plan), paths.root).job_id
    log = Path(f"{plan.resources.job_name}-{job}.log")
    try:
        state = _ended(job, told)
    except BaseException:
        call(["scancel", job])
        log.unlink(missing_ok=True)
        raise
    if state is State.COMPLETED or (state in (State.FORGOTTEN, State.UNKNOWN) and found(paths)):
        log.unlink(missing_ok=True)
        return 0
    told(f"job {job} ended as {state.name}; its log: {log.absolute()}")
    return 1


def _ended(job: str, told: Callable[[str], None]) -> State:
    """The last state of a job; every change of it is told."""
    before = None
    while True:
        state = job_state(job)
        if state is not before:
            told(f"job {job}: {state.name.lower()}")
        if not state.alive and state is not State.UNKNOWN:
            return state
        before = state
        time.sleep(POLL_SECONDS)


def script(plan: Plan) -> str:
    """The job as text. Raises Refusal where a value cannot stand in a script."""
    return render(plan, templates() / TEMPLATE)


def where(plan: Plan) -> Callable[[Plan, RunPaths], int]:
    """Which of the three forms is possible here. Raises Refusal for a Slurm plan on a machine without Slurm."""
    if plan.resources.scheduler == "none":
        return verify_here
    if own_job_id(os.environ):
        return verify_in_allocation
    if shutil.which("sbatch") is None:
        raise refuse(
            f"cluster {plan.resources.cluster} is a Slurm cluster, and this machine has no sbatch",
            hint="call this on a login node, or on this machine with --cluster local",
        )
    return verify_on_slurm


def interruptible() -> None:
    """TERM ends this process as Ctrl-C does, so that a job or ranks are not left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
