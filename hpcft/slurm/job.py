"""One job as Slurm tells of it: its facts from scontrol, its state from whoever still knows it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from hpcft.slurm.commands import SlurmAway, call
from hpcft.slurm.states import State
from hpcft.slurm.text import minutes, moment, number, pairs, word


class JobUnknown(LookupError):
    """Slurm answers and does not know the job."""


@dataclass(frozen=True)
class JobFacts:
    """``scontrol show job``, read. Times are seconds since the epoch.

    start_time of a waiting job is Slurm's estimate; end_time is the moment Slurm will end a running one.
    restarts: how often the job was requeued, this very moment. exit_code: (status, signal) of the batch script.
    """

    job_id: str
    name: str
    state: State
    reason: str | None
    restarts: int
    requeue: bool
    preempt_time: float | None
    submit_time: float | None
    start_time: float | None
    end_time: float | None
    time_limit: int | None  # minutes; None: no limit
    partition: str | None
    nodes: int
    node_list: str | None  # as Slurm folds it: n[1-4]
    excluded: str | None
    batch_host: str | None
    exit_code: tuple[int, int]
    work_dir: str | None
    stdout: str | None
    comment: str | None


def show_job(job_id: str, timeout: float = 30) -> JobFacts:
    """The facts of a job or of one array element (``12_3``; an array's bare id shows its first element).

    Raises JobUnknown where Slurm does not know it (any more), SlurmAway where the controller does not answer.
    """
    answer = call(["scontrol", "-o", "show", "job", job_id], timeout)
    line = answer.out.partition("\n")[0]
    if answer.rc != 0 or not line.startswith("JobId="):
        # Only these words mean that the job is gone; after any other failure somebody may still be running it.
        if "invalid job id" in answer.err.lower() or answer.out.startswith(f"Job {job_id} not found"):
            raise JobUnknown(f"Slurm does not know job {job_id}")
        raise SlurmAway(answer.err.strip() or f"scontrol show job {job_id} ended with {answer.rc}")
    return parse_job(line)


def parse_job(line: str) -> JobFacts:
    """The facts in one line of ``scontrol -o show job``."""
    # The name is free text and stands before every fact: "JobName=x JobState=RUNNING" must not be believed.
    named = re.match(r"JobId=\S+ (?:Array\S+ )*JobName=(.*?) UserId=\S+\(\d+\) GroupId=", line, re.DOTALL)
    # Comments are free text too; they stand after the command.
    facts = pairs((line[named.end(1) :] if named else line).partition(" Command=")[0])
    status, _, signal = facts.get("ExitCode", "").partition(":")
    return JobFacts(
        job_id=pairs(line).get("JobId", ""),
        name=named[1] if named else "",
        state=State.parse(facts.get("JobState", "")),
        reason=word(facts.get("Reason")),
        restarts=number(facts.get("Restarts")) or 0,
        requeue=facts.get("Requeue") == "1",
        preempt_time=moment(facts.get("PreemptTime")),
        submit_time=moment(facts.get("SubmitTime")),
        start_time=moment(facts.get("StartTime")),
        end_time=moment(facts.get("EndTime")),
        time_limit=minutes(facts.get("TimeLimit")),
        partition=word(facts.get("Partition")),
        nodes=number(facts.get("NumNodes")) or 0,
        node_list=word(facts.get("NodeList")),
        excluded=word(facts.get("ExcNodeList")),
        batch_host=word(facts.get("BatchHost")),
        exit_code=(number(status) or 0, number(signal) or 0),
        work_dir=word(_rest(line, "WorkDir")),
        stdout=word(_rest(line, "StdOut")),
        comment=word(_rest(line, "Comment")),
    )


def job_state(job_id: str, timeout: float = 30) -> State:
    """The state of a job, asked of squeue, then scontrol, then ``sacct -D`` where accounting is on.

    FORGOTTEN: Slurm answers and knows nothing of it. UNKNOWN: the controller is away and accounting cannot help.
    """
    try:
        state = _from_squeue(job_id, timeout)
        if state is State.UNKNOWN:
            state = show_job(job_id, timeout).state
        if state is not State.UNKNOWN:
            return state
        otherwise = State.UNKNOWN
    except JobUnknown:
        otherwise = State.FORGOTTEN
    except SlurmAway:  # squeue and scontrol ask the same controller; only the accounting is another daemon
        otherwise = State.UNKNOWN
    try:
        recorded = _from_sacct(job_id, timeout)
    except SlurmAway:
        return otherwise
    return otherwise if recorded is State.UNKNOWN else recorded


def job_states(job_ids: Collection[str], timeout: float = 30) -> dict[str, State]:
    """The states of many jobs and array elements in two calls at most, whatever their number; as ``job_state``."""
    if not job_ids:
        return {}
    otherwise = State.FORGOTTEN
    try:
        found = _queue(_jobs(job_ids), timeout)
    except SlurmAway:
        found, otherwise = {}, State.UNKNOWN
    rest = [job_id for job_id in job_ids if found.get(job_id, State.UNKNOWN) is State.UNKNOWN]
    with suppress(SlurmAway):
        recorded = _recorded(_jobs(rest), timeout) if rest else {}
        found |= {job_id: recorded[job_id] for job_id in rest if job_id in recorded}
    return {job_id: found.get(job_id, otherwise) for job_id in job_ids}


def _jobs(job_ids: Iterable[str]) -> str:
    """For --jobs: arrays by their own number, since a thousand elements may not fit on a command line."""
    return ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))


def _queue(jobs: str, timeout: float) -> dict[str, State]:
    args = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i|%T"]
    answer = call(args, timeout)
    if answer.rc != 0 and "invalid job id" not in answer.err.lower():  # which it says of one that is gone
        raise SlurmAway(answer.err.strip() or f"squeue ended with {answer.rc}")
    return _states(answer.out)


def _recorded(jobs: str, timeout: float) -> dict[str, State]:
    args = ["sacct", "-D", "-X", "--noheader", "--parsable2", f"--jobs={jobs}", "--format=JobID,State"]
    return _states(call(args, timeout).out)


def _states(text: str) -> dict[str, State]:
    """``12_3|RUNNING`` line by line; of several lines of one job the last counts."""
    rows = [line.split("|") for line in text.split("\n") if "|" in line]
    return {row[0].strip(): State.parse(row[1]) for row in rows}


def _from_squeue(job_id: str, timeout: float) -> State:
    answer = call(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"], timeout)
    states = [State.parse(line) for line in answer.out.split("\n") if line.strip()]
    return next((state for state in states if state.alive), states[0] if states else State.UNKNOWN)


def _from_sacct(job_id: str, timeout: float) -> State:
    """-D: a requeued job has one record for each time it ran; the last one is the present."""
    args = ["sacct", "-D", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State"]
    lines = [line for line in call(args, timeout).out.split("\n") if line.strip()]
    return State.parse(lines[-1]) if lines else State.UNKNOWN


def _rest(line: str, key: str) -> str | None:
    """A value with spaces in it: everything up to the next key."""
    match = re.search(rf" {key}=(.*?)(?= [A-Z][A-Za-z/]+=|\s*$)", line)
    return match[1] if match else None
