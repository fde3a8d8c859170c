"""Many runs handed to Slurm as job arrays: each run is an element with a folder, a lease and a ledger of its own.

The submission asks Slurm once about all of them and calls sbatch twice for each array, to test and to submit: a
controller that limits requests would take minutes for a thousand single submissions. All arrays are taken or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft import disk
from hpcft.errors import Problem, Refusal, refuse
from hpcft.launch.array import Array, arrays, refuse_twice
from hpcft.launch.batchlog import NOTE
from hpcft.launch.preparation import waiting
from hpcft.launch.processes import is_prepared
from hpcft.launch.render import render_array
from hpcft.launch.submissions import SUBMITTED, unended
from hpcft.launch.transport import (
    ScriptExecutor,
    Submitted,
    clean,
    hand_over,
    holding,
    job_environment,
    take_back,
    try_out,
)
from hpcft.plan.plan import Plan, data_key
from hpcft.run import lease
from hpcft.run.expand import run_folder, store_folder
from hpcft.run.folder import make_folder, refuse_other_plan, unmake
from hpcft.run.ledger import is_finished, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.commands import SlurmAway
from hpcft.slurm.job import job_states
from hpcft.slurm.limits import limits
from hpcft.slurm.states import State

FOLDER = ".arrays"  # beside the runs: scripts and batch logs of arrays, by the sweep's name


@dataclass(frozen=True)
class Sweep:
    """Runs on their way, array by array, and those left out: their folder → why."""

    submitted: tuple[Submitted, ...]
    left_out: Mapping[Path, str]


@dataclass(frozen=True)
class _Run:
    """A run before it has a job. fresh: its folder is made by this submission."""

    plan: Plan
    paths: RunPaths
    fresh: bool

    def prepare(self, text: str) -> None:
        """Its folder, so that it can be listed while it waits."""
        make_folder(self.paths.root)
        self.paths.jobs.mkdir(mode=0o700, exist_ok=True)
        disk.write(self.paths.handed_over, text, durable=False)

    def mark(self, job: str, log: Path) -> Submitted:
        """Write down which job has it, and where that writes its log."""
        note = f"# element {job} of an array of runs\n{NOTE}{log}\n"
        disk.write(self.paths.jobs / f"{job}{SUBMITTED}", note, durable=False)
        return Submitted(job, self.paths.root, "slurm")

    def undo(self) -> None:
        """Nothing was submitted: what ``prepare`` made is taken away, where nothing else has come to it."""
        if self.fresh:
            unmake(self.paths)


def submit_sweep(name: str, plans: Sequence[Plan], at_once: int | None = None) -> Sweep:
    """Hand ``plans`` to sbatch as arrays called ``name``; the jobs' working directory is this one.

    Runs that are finished or that a live job has are left out: submitted again, a sweep goes on with the others.
    at_once: how many may run at the same time. Raises Refusal where nothing is left to do, where a run cannot be
    submitted, with every such run, or where Slurm does not take an array; then no array is left in the queue.
    """
    _refuse_unfit(plans, at_once)
    _refuse_unprepared(plans)
    runs = _runs(plans)
    left_out = _left_out([run for run in runs if not run.fresh])
    todo = {id(run.plan): run for run in runs if run.paths.root not in left_out}
    if not todo:
        some = "; ".join(f"{root.name}: {why}" for root, why in list(left_out.items())[:5])
        raise refuse(f"nothing of sweep {name} is left to submit", value=f"{len(left_out)} runs", hint=some)
    try:
        bounds = limits()
    except SlurmAway as error:
        raise refuse(f"Slurm does not answer: {error}", hint="nothing was submitted; try again later") from error
    plans = [run.plan for run in todo.values()]
    parts = arrays(name, plans, bounds.max_array_size, bounds.script_bytes, at_once)
    return Sweep(tuple(_submit([_Part.of(part, todo) for part in parts])), left_out)


def _refuse_unfit(plans: Sequence[Plan], at_once: int | None) -> None:
    if not plans:
        raise refuse("a sweep without runs")
    if at_once is not None and at_once < 1:
        raise refuse("at_once: how many runs may run at the same time", value=at_once, choices=["1 or more"])
    for plan in plans:
        r = plan.resources
        if r.scheduler == "none":
            raise refuse(
                f"a sweep is a Slurm array, and cluster {r.cluster} is a machine without Slurm",
                hint="submit its runs one by one, or name a cluster with --cluster",
            )
        if r.template:
            raise refuse(
                "slurm.template: a template of your own makes the script of one run, not of an array",
                value=r.template,
                hint="leave it out for a sweep, or submit its runs one by one",
            )


def _refuse_unprepared(plans: Sequence[Plan]) -> None:
    """An array waits for no preparation: every element would find in the job that there is no data."""
    for plan in {data_key(plan.data): plan for plan in plans if plan.resources.prepare_job}.values():
        if not is_prepared(plan, store_folder(plan)):
            raise refuse(
                f"the data of run {plan.name} is not prepared, and a sweep waits for no preparation",
                value=f"prepare: {plan.resources.prepare}",
                hint="hpcft prepare, with the words of one of its runs, prepares it for all that read the same",
            )


def _runs(plans: Sequence[Plan]) -> list[_Run]:
    """Raises Refusal where two of them have one folder."""
    refuse_twice(plans)
    return [_Run(plan, paths, not paths.root.exists()) for plan in plans for paths in [RunPaths(run_folder(plan))]]


def _left_out(there: Sequence[_Run]) -> dict[Path, str]:
    """Of runs whose folder is there: those that need no job, or have one. Raises Refusal for all with another plan."""
    problems: list[Problem] = []
    for run in there:
        try:
            refuse_other_plan(run.plan, run.paths)
        except Refusal as refusal:
            problems += refusal.problems
    if problems:
        raise Refusal(problems)
    done = {run.paths.root: "finished" for run in there if is_finished(run.paths)}
    rest = [run.paths for run in there if run.paths.root not in done]
    ask = _asked(rest)
    jobs = {paths.root: holding(paths, ask) for paths in rest}
    return done | {root: f"job {job} has it already" for root, job in jobs.items() if job}


def _asked(runs: Sequence[RunPaths]) -> Callable[[str], State]:
    """The state of every job that may have one of ``runs``, asked for at once."""
    holders = [found.job for paths in runs if (found := lease.holder(paths)) is not None and not found.local]
    jobs = [(read_events(paths), job) for paths in runs for job in unended(paths)]
    before = [str(waits["preparation"]) for events, job in jobs if (waits := waiting(events, job))]
    states = job_states({*holders, *(job for _, job in jobs), *before})
    return lambda job: states.get(job, State.UNKNOWN)


@dataclass(frozen=True)
class _Part:
    """One array on its way. folder: of its script and its batch logs."""

    array: Array
    runs: tuple[_Run, ...]
    text: str
    folder: Path

    @classmethod
    def of(cls, array: Array, runs: Mapping[int, _Run]) -> _Part:
        mine = tuple(runs[id(plan)] for plan in array.plans)
        return cls(array, mine, render_array(array), mine[0].paths.root.parent / FOLDER / array.name)

    def environment(self) -> dict[str, str]:
        return job_environment(self.array.plans[0])

    def try_out(self) -> None:
        """Raises Refusal where Slurm would not take it."""
        make_folder(self.folder)
        script = self.folder / "array.sbatch"
        disk.replace(script, self.text)
        with clean(self.environment()):
            try_out(script)

    def hand_over(self) -> str:
        """Slurm's number of the array. Raises Refusal with sbatch's words."""
        # A thousand logs in a project's folder would bury it; from plain sbatch they lie there.
        logs = f"--output={str(self.folder).replace('%', '%%')}/%x-%A_%a.log"
        for run, text in zip(self.runs, self.array.texts, strict=True):
            run.prepare(text)
        with clean(self.environment()):
            return hand_over(ScriptExecutor(self.folder, self.text, self.array.plans[0], [logs]))

    def mark(self, job: str) -> list[Submitted]:
        elements = [f"{job}_{number}" for number in range(len(self.runs))]
        logs = [self.folder / f"{self.array.name}-{element}.log" for element in elements]
        return [run.mark(element, log) for run, element, log in zip(self.runs, elements, logs, strict=True)]


def _submit(parts: Sequence[_Part]) -> list[Submitted]:
    """All of them, or Refusal and none."""
    for part in parts:
        part.try_out()
    jobs: list[str] = []
    try:
        for part in parts:
            jobs.append(part.hand_over())
        return [sent for part, job in zip(parts, jobs, strict=True) for sent in part.mark(job)]
    except BaseException:
        for run in (run for part in parts[len(jobs) :] for run in part.runs):
            run.undo()
        take_back(jobs)
        raise
