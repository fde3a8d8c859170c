"""Handing a rendered script to Slurm, through submitit: it calls sbatch and keeps the job's files; no more.

submitit's own script, pickles, requeue and job states are not used: our text goes out as it is, one submission per
script, with nothing in the environment of any job that this process may itself be a part of.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from hpcft import disk
from hpcft.errors import Refusal, printable, refuse
from hpcft.launch import adoption, batchlog
from hpcft.launch.preparation import WAITS, preparation
from hpcft.launch.processes import findable
from hpcft.launch.submissions import SUBMITTED, living
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.expand import run_folder
from hpcft.run.folder import make_folder, refuse_other_plan, unmake
from hpcft.run.ledger import JOB_VARIABLE, Ledger, is_finished, read_events
from hpcft.run.paths import RUN_VARIABLE, RUNS_VARIABLE, STORE_VARIABLE, RunPaths
from hpcft.slurm import requeue
from hpcft.slurm.commands import SlurmAway, call
from hpcft.slurm.environment import scrubbed
from hpcft.slurm.states import State

# What sbatch says → what to do about it. The first that is in its words counts.
HINTS = {
    "invalid partition": "choose one that `sinfo -s` lists, as partition in the cluster profile or slurm.partition",
    "invalid account": "`sacctmgr show assoc user=$USER` lists your accounts; set account in the cluster profile",
    "invalid qos": "`sacctmgr show assoc user=$USER format=qos` lists what you may use; set slurm.qos",
    "invalid generic resource": "`sinfo -o '%P %G'` shows the GPUs by name; set gpu_request and gpu_type",
    "invalid feature": "`sinfo -o '%P %f'` shows what slurm.constraint may name",
    "reservation": "`scontrol show reservation` lists them; set slurm.reservation",
    "time limit": "`sinfo -o '%P %l'` shows the longest time of each partition; set slurm.time",
    "memory specification": "ask for less per node in slurm.mem; `sinfo -o '%P %m'` shows what nodes have (MiB)",
    "node count specification": "`sinfo -o '%P %D'` shows how many nodes each partition has",
    "node configuration is not available": "no node has so much: `sinfo -o '%n %c %m %G'` shows cores, MiB, GPUs",
    "more processors requested": "fewer nodes, tasks or cores per task; `sinfo -o '%P %c'` shows the cores of nodes",
    "policy": "a limit of your account or QOS: fewer nodes, a shorter time, or wait for other jobs to end",
    "access/permission denied": "this account may not use the partition; ask the site",
    "batch job submission failed: requested operation is presently disabled": "the site has closed submission for now",
}
BUSY = ("nodes are busy", "nodes required for job are down", "required node not available", "resources not available")


@dataclass(frozen=True)
class Submitted:
    """A run on its way. job_id: Slurm's, or the controlling process's. where: slurm or local.

    preparation: the job that prepares its data first, "" where there is none.
    """

    job_id: str
    run: Path
    where: str
    preparation: str = ""


class ScriptExecutor(SlurmExecutor):
    """submitit's Slurm executor with our script for its own; only ``_submit_command`` is ever called."""

    def __init__(self, folder: Path, script: str, plan: Plan, options: Sequence[str] = ()) -> None:
        """options: of sbatch, for what only the machine that submits can know."""
        super().__init__(folder)
        self.script, self.options = script, options
        self.file: Path | None = None  # ours; a submission of the same run beside this one has another
        r = plan.resources
        self.parameters.update(time=r.time_minutes, nodes=r.nodes, ntasks_per_node=r.tasks_per_node)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self.file = submission_file_path
        return ["sbatch", "--kill-on-invalid-dep=yes", *self.options, str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """``Submitted batch job 12``, ``12``, ``12;cluster`` (--parsable), a site's greeting before any of them."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        found = re.search(r"batch job (\d+)", text) or re.search(r"^(\d+)(?:;\S+)?\s*$", text, re.MULTILINE)
        if found is None:
            raise FailedSubmissionError(f"sbatch took the job and said no id: {printable(text)}")
        return found[1]

    def remember(self, job: str) -> None:
        """Keep the script as that of ``job``, as submitit does where sbatch says the id."""
        if (file := self._unnamed()) is not None:
            file.rename(self.folder / f"{job}{SUBMITTED}")

    def forget(self) -> None:
        """Nothing came of the script."""
        if (file := self._unnamed()) is not None:
            file.unlink()

    def _unnamed(self) -> Path | None:
        return self.file if self.file is not None and self.file.exists() and not self.file.is_symlink() else None


def slurm_here() -> bool:
    """Does this machine submit to a Slurm?"""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def submit(plan: Plan, script: str, run: Path | None = None, prepare: str = "") -> Submitted:
    """Hand ``script`` to sbatch; the job's working directory is this one. run: its folder, when not the default.

    prepare: the script of a job that prepares the data; ``script`` waits for its success, and goes with its failure.

    Raises Refusal, with sbatch's own words and a hint, where Slurm does not take it or the run cannot be submitted.
    """
    default = run_folder(plan)
    paths = RunPaths((run or default).absolute())
    fresh = not paths.root.exists()
    try:
        refuse_unsubmittable(plan, paths)
        with clean(job_environment(plan, None if paths.root == default else paths.root)):
            return _submit(plan, script, prepare, paths)
    except BaseException:
        if fresh and not any(paths.jobs.glob(f"*{SUBMITTED}")):  # else a job has been taken, and is found by the folder
            unmake(paths)
        raise


def _submit(plan: Plan, script: str, prepare: str, paths: RunPaths) -> Submitted:
    paths.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk.replace(paths.script, script)
    disk.replace(paths.handed_over, plan.to_json())
    try_out(paths.script)
    if prepare:
        return _submit_both(plan, script, prepare, paths)
    job = hand_over(ScriptExecutor(paths.jobs, script, plan))
    batchlog.tell(paths, job)
    return Submitted(job, paths.root, "slurm")


def _submit_both(plan: Plan, script: str, prepare: str, paths: RunPaths) -> Submitted:
    """The preparation, then the job that waits for it; both or neither."""
    paths.prepare_jobs.mkdir(mode=0o700, exist_ok=True)
    disk.replace(paths.prepare_script, prepare)
    try_out(paths.prepare_script)
    first = hand_over(ScriptExecutor(paths.prepare_jobs, prepare, plan))
    jobs = [first]
    try:
        jobs.append(hand_over(ScriptExecutor(paths.jobs, script, plan, [f"--dependency=afterok:{first}"])))
        log = Path.cwd() / f"prepare-{plan.resources.job_name}-{first}.log"
        Ledger(paths, "submit", {JOB_VARIABLE: jobs[1]}).write(WAITS, preparation=first, batch_log=str(log))
    except BaseException:
        take_back(jobs)
        raise
    batchlog.tell(paths, jobs[1])
    return Submitted(jobs[1], paths.root, "slurm", first)


def take_back(jobs: Sequence[str]) -> None:
    """End jobs that were taken before what belongs to them was refused. Raises Refusal where they stay in the queue."""
    for job in jobs:
        try:
            requeue.cancel(job)
        except SlurmAway as error:
            where = f"the rest of the submission was refused, and job {job} is in the queue all the same"
            raise refuse(f"{where}: {error}", hint=f"scancel {' '.join(jobs)}") from error


def check(script: Path) -> str:
    """What Slurm says of ``script`` without taking it: when and where it would start. Raises Refusal, as ``submit``."""
    with clean(scrubbed(os.environ)):
        return try_out(script)


def refuse_unsubmittable(plan: Plan, paths: RunPaths) -> None:
    """Raises Refusal where the job would only find out in an hour that it may not run; makes the run folder."""
    make_folder(paths.root)
    refuse_other_plan(plan, paths)
    if is_finished(paths):
        raise refuse(
            f"run {plan.name} is finished", where=str(paths.root), hint="export it, or give the new run a name"
        )
    if job := holding(paths):
        raise refuse(f"job {job} has this run already", where=str(paths.root), hint=_about(paths, job))


def holding(paths: RunPaths, ask: Callable[[str], State] | None = None) -> str | None:
    """The job that has the run or waits for it. Raises Refusal where that cannot be found out."""
    holder = lease.holder(paths)
    if holder is not None and lease.alive(holder, ask):
        return holder.job
    waits = [job for job, state in living(paths, ask).items() if state.alive]  # it has no lease before it starts
    events = read_events(paths)
    for job in [job for job in waits if (before := preparation(paths, events, job, ask)) and before.failed]:
        with contextlib.suppress(SlurmAway):  # it waits for what will not come: Slurm would end it within a minute
            requeue.cancel(job)
        waits.remove(job)
    return next(iter(waits), None)


def _about(paths: RunPaths, job: str) -> str:
    """What to do about a job that has the run."""
    if any(event["event"] == "cancelled" and event["job"] == job for event in read_events(paths)):
        return f"it was cancelled and its ranks still save; try again when this says so: hpcft status {paths.root}"
    return f"follow it: hpcft logs -f {paths.root}; end it: hpcft cancel {paths.root}"


def job_environment(plan: Plan, run: Path | None = None) -> dict[str, str]:
    """This process's environment without any trace of a job, and what the script cannot know by itself.

    run: the run's folder where it is not the one in the plan.
    """
    environ = scrubbed(os.environ)
    for name in (RUN_VARIABLE, RUNS_VARIABLE, JOB_VARIABLE, STORE_VARIABLE):
        environ.pop(name, None)
    if run is not None:
        environ[RUN_VARIABLE] = str(run)
    # Without setup lines nothing in the job says which Python has hpcft: it is the one that submits.
    if not plan.resources.setup:
        environ.setdefault("HPCFT_PYTHON", sys.executable)
    return findable(environ)


def hand_over(executor: ScriptExecutor) -> str:
    """The id of the job that sbatch made of it. Raises Refusal with sbatch's words."""
    before = adoption.alike(executor.script)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what we are about to say
            return str(executor._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        words = _plain(str(error))
        try:
            if not adoption.lost(words):
                raise _refused(words) from error
            job = adoption.adopt(executor.script, before, words)
        except Refusal:
            executor.forget()
            raise
        executor.remember(job)
        return job
    except KeyboardInterrupt as error:
        if (taken := adoption.came(executor.script, before)) is None:
            raise
        executor.remember(taken)
        raise refuse(f"interrupted, and job {taken} is in the queue all the same", hint=f"scancel {taken}") from error


def try_out(script: Path) -> str:
    """When and where ``script`` would start, in Slurm's words. Raises Refusal where it would never."""
    try:
        answer = call(["sbatch", "--test-only", "--kill-on-invalid-dep=yes", str(script)])
    except SlurmAway as error:
        raise refuse(f"Slurm does not answer: {error}", hint="nothing was submitted; try again later") from error
    words = answer.err.strip()
    if answer.rc != 0 and not any(busy in words.lower() for busy in BUSY):
        raise _refused(words)
    return re.sub(r"(?m)^sbatch: ", "", words).replace("Job ", "job ", 1)


def _refused(words: str) -> Refusal:
    words = _plain(words)
    hint = next((hint for part, hint in HINTS.items() if part in words.lower()), "")
    return refuse(f"sbatch: {words}", hint=hint)


def _plain(words: str) -> str:
    return " ".join(re.sub(r"(?m)^sbatch: (error: )?", "", words).split())


@contextlib.contextmanager
def clean(environ: Mapping[str, str]) -> Iterator[None]:
    """While sbatch runs: this environment, and a umask that makes the job's log its owner's alone."""
    before, umask = dict(os.environ), os.umask(0o077)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.umask(umask)
        os.environ.clear()
        os.environ.update(before)
