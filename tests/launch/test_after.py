"""What srun's own words say about a dead rank, and what the helpers do with the run folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcft.errors import Refusal
from hpcft.launch.accept import EXIT_FINISHED, EXIT_GO_ON, accept
from hpcft.launch.after import after, culprit
from hpcft.launch.begin import EXIT_LATE, begin
from hpcft.launch.begin import main as begin_main
from hpcft.launch.decide import Action, Ending
from hpcft.launch.entry import run
from hpcft.launch.logs import clean
from hpcft.plan.difference import differing
from hpcft.run import lease, ledger
from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm import commands
from hpcft.slurm.states import State
from tests.clock import Clock
from tests.plans import plan

KILLED = """\
srun: error: n2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=12.1
slurmstepd: error: *** STEP 12.1 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: n1: tasks 0-1: Exited with exit code 75
srun: error: n2: task 2: Terminated
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (KILLED, "rank 3 on n2: Killed"),
        ("\n".join(reversed(KILLED.splitlines())), "rank 3 on n2: Killed"),
        ("srun: error: n[1-2]: tasks 0-3: Exited with exit code 1\n", "ranks 0-3 on n[1-2]: Exited with exit code 1"),
        ("srun: error: n1: tasks 0-1: Exited with exit code 75\n", "ranks 0-1 on n1: Exited with exit code 75"),
        (
            "srun: error: n1: task 0: Segmentation fault (core dumped)\n",
            "rank 0 on n1: Segmentation fault (core dumped)",
        ),
        (
            "srun: error: n2: task 2: Exited with exit code 1\nsrun: error: n2: task 3: Killed\n",
            "rank 3 on n2: Killed",
        ),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n", ""),
    ],
)
def test_the_rank_that_died_is_named_and_not_those_that_were_told_to_end(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "srun.log").write_text(text)
    assert culprit(tmp_path / "srun.log") == words


def test_without_a_word_of_srun_nobody_is_named(tmp_path: Path) -> None:
    assert culprit(tmp_path / "srun.log") == ""


def here() -> dict[str, str]:
    return {"HPCFT_JOB": lease.local_job()}


def test_a_plan_is_taken_up_kept_privately_and_the_run_held(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "runs/tiny")
    assert accept(plan().to_json(), paths, here()) == EXIT_GO_ON
    assert paths.plan.read_text() == plan().to_json()
    assert lease.still_mine(paths, here())
    assert paths.root.stat().st_mode & 0o077 == 0
    assert not [path for path in paths.root.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]


def test_a_finished_run_says_so_and_is_left_alone(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    Ledger(paths, "rank-0000", here()).write("finished", step=4)
    assert accept(plan().to_json(), paths, here()) == EXIT_FINISHED
    assert lease.holder(paths) is None


def test_another_plan_is_refused_with_every_key_that_differs(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    accept(plan().to_json(), paths, here())
    changed = plan(optim={"learning_rate": 9.0}, data={"seed": 8}, resources={"time_minutes": 99})
    with pytest.raises(Refusal, match=r"data\.seed, optim\.learning_rate differ"):
        accept(changed.to_json(), paths, here())
    assert paths.plan.read_text() == plan().to_json()


def test_every_key_in_which_two_plans_differ_is_found() -> None:
    assert differing(plan(), plan()) == []
    assert differing(plan(budgets={"failures": 9}), plan()) == ["budgets.failures"]


def test_a_job_waits_for_an_answer_whether_another_one_still_has_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, states = RunPaths(tmp_path), [State.UNKNOWN, State.UNKNOWN, State.FAILED]
    lease.take(paths, {"HPCFT_JOB": "5"})
    monkeypatch.setattr(commands, "time", Clock())
    monkeypatch.setattr(lease, "job_state", lambda job: states.pop(0))
    assert accept(plan().to_json(), paths, {"HPCFT_JOB": "7"}) == EXIT_GO_ON
    assert not states
    assert capsys.readouterr().err.count("asking again for 15 minutes") == 1
    monkeypatch.setattr(lease, "job_state", lambda job: State.UNKNOWN)
    with pytest.raises(Refusal, match="held by job 7, and Slurm cannot be asked"):
        accept(plan().to_json(), paths, {"HPCFT_JOB": "8"})


@pytest.mark.parametrize("brought", ["another plan", "the end"])
def test_what_a_job_brought_that_was_waited_for_is_looked_at(
    brought: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, states = RunPaths(tmp_path), [State.UNKNOWN, State.FAILED]
    lease.take(paths, {"HPCFT_JOB": "5"})

    def state(job: str) -> State:
        if brought == "another plan":
            paths.plan.write_text(plan(data={"seed": 8}).to_json())
        elif len(states) == 2:
            Ledger(paths, "rank-0000", {"HPCFT_JOB": "5"}).write("finished", step=4)
        return states.pop(0)

    monkeypatch.setattr(commands, "time", Clock())
    monkeypatch.setattr(lease, "job_state", state)
    if brought == "the end":
        assert accept(plan().to_json(), paths, {"HPCFT_JOB": "7"}) == EXIT_FINISHED
    else:
        with pytest.raises(Refusal, match=r"holds another plan: data\.seed differ"):
            accept(plan().to_json(), paths, {"HPCFT_JOB": "7"})
        assert '"seed": 8' in paths.plan.read_text()
    assert lease.holder(paths) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1}', "not json"])
def test_a_script_whose_plan_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(Refusal):
        accept(text, RunPaths(tmp_path), here())
    assert not (tmp_path / "plan.json").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot be made"):
        accept(plan().to_json(), RunPaths(tmp_path / "file/run"), here())


def test_a_run_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(Refusal, match="another user"):
        accept(plan().to_json(), RunPaths(tmp_path), here())


def test_attempts_are_numbered_from_one_with_a_folder_for_logs_and_a_place_to_meet(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    accept(plan().to_json(), paths, here())
    first, second = begin(plan(), paths, here()), begin(plan(), paths, here())
    assert (first.number, second.number) == (1, 2)
    assert first.logs.is_dir()
    assert first.address == "127.0.0.1"
    assert 1024 < first.port < 32768
    assert lease.still_mine(paths, {**here(), "HPCFT_ATTEMPT": "2"})
    assert not lease.still_mine(paths, {**here(), "HPCFT_ATTEMPT": "1"})
    assert [event["attempt"] for event in read_events(paths) if event["event"] == "attempt_began"] == [1, 2]


def test_a_requeued_job_over_its_budget_begins_no_further_attempt(tmp_path: Path) -> None:
    paths, chosen = RunPaths(tmp_path), plan(budgets={"time_limits": 0})
    accept(chosen.to_json(), paths, here())
    begin(chosen, paths, here())
    Ledger(paths, "rank-0000", {**here(), "HPCFT_ATTEMPT": "1"}).write("stopping", cause="time_limit", step=3)
    with pytest.raises(Refusal, match="the budget is 0"):
        begin(chosen, paths, here())
    assert lease.holder(paths) is None


@pytest.mark.parametrize(
    ("line", "shown"), [("a\tb\n", "a\tb"), ("10%\r20%\r30%\n", "30%"), ("\x1b[2Jx\n", "\\x1b[2Jx"), ("x\r\n", "x")]
)
def test_a_log_line_cannot_move_the_readers_cursor(line: str, shown: str) -> None:
    assert clean(line) == shown


# `scontrol`, as after and begin see it: what it says is for each test, and every call is one line of `calls`.
SCONTROL = """#!/bin/bash
echo "$*" >> "$FOLDER/calls"
away() { echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
"""
JOB = "JobId=7 JobName=tiny UserId=me(1) GroupId=me(1) JobState={state} Requeue=1 Restarts=0 PreemptTime={preempted}"


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> Callable[[], list[str]]:
    """``says``, lines of bash, stands on PATH as scontrol; what it was asked so far."""
    program = folder / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(SCONTROL.replace("$FOLDER", str(folder)) + says + "\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    calls = folder / "calls"
    return lambda: calls.read_text().splitlines() if calls.exists() else []


IN_SLURM = {"SLURM_JOB_ID": "7", "HPCFT_ATTEMPT": "1"}


def test_a_controller_that_is_away_for_long_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, paths = Clock(), RunPaths(tmp_path / "run")
    paths.root.mkdir()
    monkeypatch.setattr(commands, "time", clock)
    # Preempted, as Slurm says after ten minutes; then it is away for as long when it is asked to requeue the job.
    calls = scontrol(
        tmp_path,
        monkeypatch,
        f'n=$(wc -l < {tmp_path}/calls)\n[ "$n" -lt 80 ] && away\n[ "$n" -gt 160 ] || [[ "$*" != requeue* ]] || away\n'
        f'[[ "$*" != requeue* ]] || exit 0\necho "{JOB.format(state="RUNNING", preempted="2999-01-01T00:00:00")}"',
    )
    decision = after(plan(), paths, IN_SLURM, 143)
    assert decision.action is Action.REQUEUE, decision
    assert clock.now > 1000
    assert calls()[-1] == "requeue 7"


def killed(folder: Path) -> RunPaths:
    """A run of whose first attempt srun says that a rank was killed."""
    paths = RunPaths(folder / "run")
    paths.attempt(1).mkdir(parents=True)
    (paths.attempt(1) / "srun.log").write_text(KILLED)
    return paths


def test_a_rank_that_dies_near_the_time_limit_is_named_and_the_job_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = killed(tmp_path)
    job = JOB.format(state="RUNNING", preempted="None") + f" EndTime={at(100)}"
    calls = scontrol(tmp_path, monkeypatch, f'[[ "$*" != requeue* ]] || exit 0\necho "{job}"')
    decision = after(plan(), paths, IN_SLURM, 137)
    assert (decision.action, decision.ending) == (Action.REQUEUE, Ending.FAILED)
    assert decision.why.startswith("rank 3 on n2: Killed")
    assert "requeue 7" in calls()


def test_a_scancel_between_the_decision_and_its_requeue_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = killed(tmp_path)
    near = JOB.format(state="RUNNING", preempted="None") + f" EndTime={at(100)}"
    cancelled = JOB.format(state="COMPLETING", preempted="None") + " Reason=None"
    says = f'[ "$(grep -c "show job" {tmp_path}/calls)" -gt 2 ] && echo "{cancelled}" || echo "{near}"'
    calls = scontrol(tmp_path, monkeypatch, says)
    decision = after(plan(), paths, IN_SLURM, 137)
    assert (decision.action, decision.ending) == (Action.STOP, Ending.CANCELLED)
    assert not [call for call in calls() if call.startswith("requeue")]


def test_ranks_that_slurm_ended_at_the_time_limit_are_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = killed(tmp_path)
    job = JOB.format(state="COMPLETING", preempted="None") + f" Reason=TimeLimit EndTime={at(-1)}"
    scontrol(tmp_path, monkeypatch, f'[[ "$*" != requeue* ]] || exit 0\necho "{job}"')
    decision = after(plan(), paths, IN_SLURM, 137)
    assert (decision.action, decision.ending) == (Action.REQUEUE, Ending.TIME_LIMIT)


def no_space(*words: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("preempted", "action"), [("None", Action.STOP), ("2999-01-01T00:00:00", Action.REQUEUE)])
def test_on_a_full_disk_the_reason_is_said_and_only_what_needs_no_budget_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: str, action: Action
) -> None:
    paths = RunPaths(tmp_path / "run")
    accept(plan().to_json(), paths, IN_SLURM)
    paths.attempt(1).mkdir(parents=True)
    (paths.attempt(1) / "srun.log").write_text(KILLED)
    job = JOB.format(state="RUNNING", preempted=preempted)
    scontrol(tmp_path, monkeypatch, f'[[ "$*" != requeue* ]] || exit 0\necho "{job}"')
    monkeypatch.setattr(ledger, "_append", no_space)
    decision = after(plan(), paths, IN_SLURM, 137)
    assert decision.action is action
    assert "the ledger cannot be written: No space left on device" in decision.why
    assert ("rank 3 on n2: Killed" in decision.why) == (action is Action.STOP)


def test_a_helper_says_in_words_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    paths = RunPaths(tmp_path / "run")
    assert run(lambda: accept(plan().to_json(), paths, here())) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(paths.root) in said
    assert "df -h" in said


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run(lambda: len(os.listdir("/nowhere")))


def test_a_term_while_slurm_is_asked_does_not_end_the_one_who_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path / "run")
    accept(plan().to_json(), paths, {"HPCFT_JOB": "7", **IN_SLURM})
    says = f'[ -e {tmp_path}/back ] || away\necho "{JOB.format(state="COMPLETING", preempted="None")} Reason=None"'
    calls = scontrol(tmp_path, monkeypatch, says)
    environ = {**os.environ, **IN_SLURM, "HPCFT_RUN": str(paths.root)}
    process = subprocess.Popen([sys.executable, "-m", "hpcft.launch.after", "143"], env=environ)
    while not calls():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "back").touch()
    assert process.wait(180) == Action.STOP.value
    assert [event["ending"] for event in read_events(paths) if event["event"] == "attempt_ended"] == ["cancelled"]


def test_a_job_that_slurm_brings_back_after_its_cancellation_begins_no_further_attempt(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    accept(plan().to_json(), paths, {"HPCFT_JOB": "7"})
    begin(plan(), paths, {"HPCFT_JOB": "7"})
    Ledger(paths, "cancel", {"HPCFT_JOB": "7"}).write("cancelled", by="hpcft cancel")
    with pytest.raises(Refusal, match="cancelled by hpcft cancel"):
        begin(plan(), paths, {"HPCFT_JOB": "7", "SLURM_RESTART_COUNT": "1"})
    lease.take(paths, {"HPCFT_JOB": "7", "SLURM_RESTART_COUNT": "1"})
    with pytest.raises(Refusal, match="cancelled by hpcft cancel"):
        begin(plan(), paths, {"HPCFT_JOB": "7", "SLURM_RESTART_COUNT": "1"})
    assert lease.holder(paths) is None
    assert begin(plan(), paths, {"HPCFT_JOB": "8"}).number == 2, "submitted again it is not cancelled any more"


def test_a_run_of_this_machine_may_have_the_name_of_one_that_was_cancelled(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    accept(plan().to_json(), paths, here())
    Ledger(paths, "cancel", here()).write("cancelled", by="hpcft cancel")
    assert begin(plan(), paths, here()).number == 1


def at(seconds: float, now: float | None = None) -> str:
    """A moment from now, as scontrol says it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime((now or time.time()) + seconds))


# The warning was asked for 60 s before the end and may come 90 s earlier. A job of 100 s lets its ranks start all the
# same, while there is half of it.
@pytest.mark.parametrize(
    ("ran", "left", "code"),
    [
        (9999, 59, EXIT_LATE),
        (9999, 65, EXIT_LATE),
        (9999, 149, EXIT_LATE),
        (9999, 150, 0),
        (9999, 36000, 0),
        (5, 95, 0),
        (45, 58, EXIT_LATE),
        (0, None, 0),
    ],
)
def test_an_attempt_that_may_have_missed_the_warning_before_the_time_limit_starts_no_ranks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ran: int,
    left: int | None,
    code: int,
) -> None:
    paths = RunPaths(tmp_path / "run")
    accept(plan().to_json(), paths, {"HPCFT_JOB": "7"})
    now = float(int(time.time()))
    monkeypatch.setattr("hpcft.launch.begin.time", SimpleNamespace(time=lambda: now))
    job = JOB.format(state="RUNNING", preempted="None") + f" StartTime={at(-ran, now)} EndTime={at(left or 0, now)}"
    scontrol(tmp_path, monkeypatch, f'echo "{job}"' if left else "away")
    for name, value in {"HPCFT_JOB": "7", "SLURM_JOB_ID": "7", "HPCFT_RUN": str(paths.root)}.items():
        monkeypatch.setenv(name, value)
    assert begin_main() == code
    assert capsys.readouterr().out.split()[0] == "1"
