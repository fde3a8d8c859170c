"""Starting a run on this machine through submitit's local executor, so that it outlives the terminal.

``python -m hpcft.launch.background RUN``, started in a session of its own, prints the controlling process's id.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from submitit.local.local import LocalExecutor

from hpcft import disk
from hpcft.alive import born, descends
from hpcft.errors import refuse
from hpcft.launch.entry import run
from hpcft.launch.processes import safe
from hpcft.launch.transport import Submitted, job_environment, refuse_unsubmittable
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.expand import run_folder
from hpcft.run.ledger import is_finished, read_events
from hpcft.run.paths import RUN_VARIABLE, RunPaths

# submitit ends a local job after two minutes unless told otherwise; a workstation has no time limit.
LONGEST_MINUTES = 365 * 24 * 60
BEGIN_SECONDS = 30


def submit_here(plan: Plan, script: str, run: Path | None = None) -> Submitted:
    """Start the run on this machine, in the background. Raises Refusal where it cannot be submitted."""
    paths = RunPaths((run or run_folder(plan)).absolute())
    refuse_unsubmittable(plan, paths)
    if plan.layout.nodes != 1:
        raise refuse(f"this machine is one node, the plan has {plan.layout.nodes}", hint="slurm.nodes: 1")
    paths.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk.replace(paths.script, script)
    disk.replace(paths.handed_over, plan.to_json())
    environ = safe(job_environment(plan)) | {RUN_VARIABLE: str(paths.root)}
    log = os.open(paths.jobs / "background.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hpcft.launch.background", str(paths.root)],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    finally:
        os.close(log)
    if done.returncode != 0:
        raise refuse("the run could not be started here", where=str(paths.jobs / "background.log"))
    job_id = done.stdout.strip()
    _wait_until_begun(paths, int(job_id))
    return Submitted(job_id, paths.root, "local")


def _wait_until_begun(paths: RunPaths, controller: int) -> None:
    """The run is ours once it holds its lease and has said so. Raises Refusal with the words of one that ended."""
    end = time.monotonic() + BEGIN_SECONDS
    while not _begun(paths, controller) and not is_finished(paths) and time.monotonic() < end:
        if not born(controller) and not is_finished(paths):
            log = paths.jobs / f"{controller}_0_log.out"
            words = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            raise refuse(f"the run ended at once: {' '.join(words[-5:])}", where=str(log))
        time.sleep(0.1)


def _begun(paths: RunPaths, controller: int) -> bool:
    """Whether the holder of the lease has told the ledger: before that, status would not know its job.

    It has to be a process of ``controller``: where the run is submitted twice at once, one of the two is refused.
    """
    holder = lease.holder(paths)
    told = [event["job"] for event in read_events(paths) if event["event"] == "accepted"]
    return holder is not None and holder.job in told and descends(holder.pid, controller)


def start(folder: Path) -> str:
    """One task, ``hpcft.launch.local``, through submitit; the id of the process that minds it."""
    executor = LocalExecutor(folder)
    executor.parameters.update(timeout_min=LONGEST_MINUTES, tasks_per_node=1, stderr_to_stdout=True)
    return str(executor._submit_command(shlex.join(_command(os.environ.get("CUDA_VISIBLE_DEVICES")))).job_id)


def _command(devices: str | None) -> list[str]:
    """submitit sets CUDA_VISIBLE_DEVICES to what it was asked for, which is nothing: put the user's choice back."""
    keep = ["-u", "CUDA_VISIBLE_DEVICES"] if devices is None else [f"CUDA_VISIBLE_DEVICES={devices}"]
    return ["env", *keep, sys.executable, "-u", "-m", "hpcft.launch.local"]


def main() -> int:
    os.umask(0o077)
    # The controller lives on and must not hold the pipe on which the id goes back.
    pipe = os.dup(1)
    os.set_inheritable(pipe, False)
    os.dup2(2, 1)
    job_id = start(RunPaths(Path(sys.argv[1])).jobs)
    os.write(pipe, f"{job_id}\n".encode())
    os.close(pipe)
    sys.stdout.flush()
    os._exit(0)  # submitit's job object would wait for its process, or complain that it lives


if __name__ == "__main__":
    sys.exit(run(main))
