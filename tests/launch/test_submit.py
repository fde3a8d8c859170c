"""Submission through submitit to a real Slurm: our text, a clean environment, sbatch's words with a hint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import FailedSubmissionError

from hpcft.errors import Refusal
from hpcft.launch import adoption, logs, transport, watch
from hpcft.launch.render import render
from hpcft.launch.submissions import unended
from hpcft.launch.transport import HINTS, ScriptExecutor, Submitted, submit
from hpcft.plan.plan import Plan
from hpcft.run.ledger import Ledger
from hpcft.run.paths import RunPaths
from hpcft.slurm.states import State
from tests.launch.conftest import furnish
from tests.loopback import LoopbackSlurm
from tests.plans import plan


@pytest.fixture
def send(
    slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Submitted]:
    def start(plan: Plan, **words: Any) -> Submitted:
        furnish(tmp_path, plan)
        monkeypatch.chdir(tmp_path)
        return submit(plan, render(plan), **words)

    return start


def test_a_run_is_submitted_queued_finished_and_its_status_known(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    sent = send(plan())
    assert sent.run == tmp_path / "runs/tiny"
    assert watch.status(sent.run).job == sent.job_id
    assert watch.wait_until_ended(sent.run, 180).state == "finished"
    slurm.wait_for(sent.job_id, State.COMPLETED)
    assert (sent.run / f"jobs/{sent.job_id}_submission.sh").read_text() == render(plan())
    assert not list(sent.run.rglob("*.pkl"))
    assert [run.name for run in watch.runs(tmp_path / "runs")] == ["tiny"]
    loose = [path for path in [*sent.run.rglob("*"), *tmp_path.glob("*.log")] if path.stat().st_mode & 0o077]
    assert not [path for path in loose if not path.is_symlink()]
    with pytest.raises(Refusal, match="finished"):
        send(plan())


def test_a_job_that_dies_before_its_first_attempt_leaves_its_log_and_a_reason(
    send: Callable[..., Submitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCFT_PYTHON", "false")
    sent = send(plan())
    now = watch.wait_until_ended(sent.run, 180)
    log = tmp_path / f"tiny-{sent.job_id}.log"
    assert (now.state, now.batch_log) == ("stopped", log)
    assert now.why == f"the job ended before an attempt began; its log: {log}"
    assert "cannot run hpcft" in "\n".join(logs.read(RunPaths(sent.run)))
    assert logs.log_files(RunPaths(sent.run)) == [log]
    followed = list(logs.follow(RunPaths(sent.run), lambda: True))
    assert followed[0] == "== the batch script"
    assert "cannot run hpcft" in followed[-1]


def test_a_script_of_plain_sbatch_says_itself_where_its_log_is(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, standin: dict[str, str]
) -> None:
    furnish(tmp_path, plan())
    (tmp_path / "job.sbatch").write_text(render(plan()))
    job = slurm.run(["sbatch", "--parsable", "job.sbatch"], cwd=tmp_path, environ=standin).stdout.strip()
    slurm.wait_for(job, State.COMPLETED)
    assert watch.status(tmp_path / "runs/tiny").batch_log == tmp_path / f"tiny-{job}.log"


def test_a_waiting_job_is_pending_and_can_be_cancelled(send: Callable[..., Submitted], slurm: LoopbackSlurm) -> None:
    sent = send(plan(resources={"extra": ("--begin=now+1hour",)}))
    assert watch.status(sent.run).state == "pending"
    assert "cancelled job" in watch.cancel(sent.run)
    slurm.wait_for(sent.job_id, State.CANCELLED)
    assert watch.status(sent.run).state == "cancelled"
    assert "nothing to cancel" in watch.cancel(sent.run)


def test_a_run_that_waits_is_not_submitted_again(send: Callable[..., Submitted]) -> None:
    waiting = plan(resources={"extra": ("--begin=now+1hour",)})
    sent = send(waiting)
    with pytest.raises(Refusal, match=f"job {sent.job_id} has this run already"):
        send(waiting)
    watch.cancel(sent.run)
    assert send(waiting).job_id != sent.job_id


def test_a_full_disk_keeps_no_job_from_being_cancelled(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    sent = send(plan(resources={"extra": ("--begin=now+1hour",)}))
    words = f"ulimit -f 0; exec {sys.executable} -m hpcft.cli.main cancel {sent.run}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cancelled job" in done.stdout
    assert "the ledger cannot be told: File too large" in done.stdout
    slurm.wait_for(sent.job_id, State.CANCELLED)


def test_cancel_ends_every_job_of_the_run(send: Callable[..., Submitted], slurm: LoopbackSlurm) -> None:
    sent = send(plan(resources={"extra": ("--begin=now+1hour",)}))
    # As plain sbatch would: it asks nobody, and its job is known by the ledger once it has begun.
    script = ["sbatch", "--parsable", "--hold", str(RunPaths(sent.run).script)]
    other = slurm.run(script).stdout.strip()
    Ledger(RunPaths(sent.run), "batch", {"HPCFT_JOB": other}).write("accepted", plan="x", store=None)
    assert watch.cancel(sent.run).startswith(f"cancelled job {sent.job_id}, {other};")
    for job in (sent.job_id, other):
        slurm.wait_for(job, State.CANCELLED)


def test_a_cancellation_with_the_controller_away_is_kept_and_done_when_asked_again(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = send(plan(resources={"extra": ("--begin=now+1hour",)}))
    with monkeypatch.context() as away:
        away.setenv("SLURM_CONF", str(tmp_path / "not-mounted"))
        with pytest.raises(watch.SlurmAway):
            watch.cancel(sent.run)
        assert watch.status(sent.run).state == "cancelled"
    assert slurm.state(sent.job_id) is State.PENDING
    assert "cancelled job" in watch.cancel(sent.run)
    slurm.wait_for(sent.job_id, State.CANCELLED)


def test_jobs_that_the_ledger_knows_to_have_ended_are_not_asked_about(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.jobs.mkdir()
    for job, text in (("5", "#!/bin/bash"), ("6", "#!/bin/bash"), ("77", "")):  # 77: a process of this machine
        (paths.jobs / f"{job}_submission.sh").write_text(text)
    Ledger(paths, "batch", {"HPCFT_JOB": "5"}).write("attempt_ended", decision="stop")
    Ledger(paths, "batch", {"HPCFT_JOB": "local-n-4"}).write("accepted")
    assert unended(paths) == ["6"]
    Ledger(paths, "batch", {"HPCFT_JOB": "5"}).write("accepted")  # somebody has requeued it
    assert unended(paths) == ["5", "6"]


def test_a_run_folder_elsewhere_is_told_to_the_job(send: Callable[..., Submitted], tmp_path: Path) -> None:
    sent = send(plan(), run=tmp_path / "else where")
    assert watch.wait_until_ended(tmp_path / "else where", 180).state == "finished"
    assert sent.run == tmp_path / "else where"
    assert not (tmp_path / "runs").exists()


def test_nothing_of_the_job_we_are_in_reaches_the_new_one(
    send: Callable[..., Submitted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "SBATCH_PARTITION": "high",
        "SBATCH_NODES": "3",
        "SLURM_CPU_BIND": "map_cpu:0",
        "SLURM_GPUS_PER_NODE": "2",
        "MASTER_PORT": "1",
        "HPCFT_RUN": "/somewhere",
        "HPCFT_ATTEMPT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    sent = send(plan(resources={"partition": "low"}))
    assert watch.wait_until_ended(sent.run, 180).state == "finished"
    (log,) = tmp_path.glob("tiny-*.log")
    assert "warning" not in log.read_text()
    assert watch.status(sent.run).attempts[0].number == 1


@pytest.mark.parametrize(
    ("resources", "words", "hint"),
    [
        ({"partition": "nowhere"}, "invalid partition", "sinfo -s"),
        ({"nodes": 9}, "(?i)node", "sinfo"),
        ({"cpus_per_task": 99}, "(?i)node|processors", "sinfo"),
        ({"gpus_per_node": 2, "gpu_request": "gres_typed", "gpu_type": "b200"}, "configuration", "%G"),
        ({"constraint": "gpu80g"}, "feature", "sinfo -o '%P %f'"),
    ],
)
def test_what_slurm_refuses_is_refused_in_its_words_with_a_hint(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, resources: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(Refusal, match=words) as refused:
        send(plan(resources=resources))
    (problem,) = refused.value.problems
    assert problem.what.startswith("sbatch: ")
    assert hint in problem.hint
    assert not slurm.run(["squeue", "-h"]).stdout.strip()


def test_a_refused_submission_leaves_no_run(send: Callable[..., Submitted], tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="invalid partition"):
        send(plan(resources={"partition": "nowhere"}))
    assert watch.runs(tmp_path / "runs") == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_submission_that_is_interrupted_when_the_job_is_queued_leaves_what_finds_it(
    send: Callable[..., Submitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpcft.launch.batchlog.tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        send(plan())
    (run,) = watch.runs(tmp_path / "runs")
    assert watch.wait_until_ended(tmp_path / "runs" / run.name, 180).state == "finished"


def loses_answers(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "", takes: bool = True) -> None:
    """An sbatch that submits, and then says what a client says that has waited too long. before: lines of bash."""
    real = shutil.which("sbatch")
    program = folder / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        f'[[ "$*" == *--test-only* ]] && exec {real} "$@"\n'
        f"{before}\n"
        + (f'{real} "$@" > /dev/null\n' if takes else "")
        + 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1\n'
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_submission_that_is_interrupted_before_it_hears_of_its_job_names_it(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScriptExecutor, "_get_job_id_from_submission_command", staticmethod(interrupted))
    with pytest.raises(Refusal, match="interrupted, and job") as refused:
        send(plan(resources=WAITING))
    (job,) = queued(slurm)
    assert f"scancel {job}" in str(refused.value)
    assert watch.status(tmp_path / "runs/tiny").job == job


def test_a_submission_that_fails_leaves_the_script_of_another_one_beside_it(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "PATIENCE_SECONDS", 0.0)
    beside = tmp_path / "runs/tiny/jobs/.submission_file_beside.sh"
    loses_answers(tmp_path, monkeypatch, f"echo > {beside}", takes=False)
    with pytest.raises(Refusal, match="no job tiny of this folder has come"):
        send(plan(resources=WAITING))
    assert beside.exists()


def queued(slurm: LoopbackSlurm) -> list[str]:
    return slurm.run(["squeue", "-h", "-o", "%i"]).stdout.split()


WAITING = {"extra": ("--begin=now+1hour",)}


def test_a_job_whose_answer_was_lost_is_found_in_the_queue_and_is_the_runs(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jobs that were there before, or stand in another folder, or have another name, are not taken for it.
    other = ["sbatch", "--parsable", "--hold", "--wrap=true"]
    slurm.run([*other, "--job-name=tiny"], cwd=tmp_path)
    strangers = f"real={shutil.which('sbatch')}; $real --hold --wrap=true --job-name=other > /dev/null"
    strangers += "; (cd / && $real --hold --wrap=true --job-name=tiny > /dev/null)"
    loses_answers(tmp_path, monkeypatch, strangers)
    sent = send(plan(resources=WAITING))
    assert sent.job_id == max(queued(slurm), key=int)
    assert (sent.run / f"jobs/{sent.job_id}_submission.sh").read_text() == render(plan(resources=WAITING))
    assert (watch.status(sent.run).job, watch.status(sent.run).state) == (sent.job_id, "pending")
    with pytest.raises(Refusal, match=f"job {sent.job_id} has this run already"):
        send(plan(resources=WAITING))
    assert "cancelled job" in watch.cancel(sent.run)
    slurm.wait_for(sent.job_id, State.CANCELLED)


def test_of_several_jobs_that_may_be_it_none_is_taken_and_all_are_named(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = f"{shutil.which('sbatch')} --hold --wrap=true --job-name=tiny > /dev/null"
    loses_answers(tmp_path, monkeypatch, twin)
    with pytest.raises(Refusal, match=r"Socket timed out.* 2 jobs tiny of this folder") as refused:
        send(plan(resources=WAITING))
    jobs = sorted(queued(slurm), key=int)
    assert len(jobs) == 2
    assert f"value: {', '.join(jobs)}" in str(refused.value)
    assert f"scancel {' '.join(jobs)}" in str(refused.value)


def test_an_answer_that_was_lost_with_its_job_is_refused_with_what_to_look_at(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "PATIENCE_SECONDS", 1.0)
    loses_answers(tmp_path, monkeypatch, takes=False)
    with pytest.raises(Refusal, match="no job tiny of this folder has come") as refused:
        send(plan(resources=WAITING))
    assert "squeue --me --name=tiny" in str(refused.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_preparation_whose_trainings_answer_was_lost_stays_with_it(
    send: Callable[..., Submitted], slurm: LoopbackSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = "#!/bin/bash\n#SBATCH --job-name=prepare-tiny\n#SBATCH --hold\ntrue\n"
    loses_answers(tmp_path, monkeypatch)
    sent = send(plan(), prepare=prepare)
    assert sorted(queued(slurm), key=int) == [sent.preparation, sent.job_id]


def test_check_says_when_and_where_a_script_would_start(slurm: LoopbackSlurm, tmp_path: Path) -> None:
    (tmp_path / "job.sbatch").write_text(render(plan()))
    assert "to start at" in transport.check(tmp_path / "job.sbatch")
    assert not slurm.run(["squeue", "-h"]).stdout.strip()


def test_another_plan_under_the_same_name_is_refused_before_the_queue(
    send: Callable[..., Submitted], tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path / "runs/tiny")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(plan(optim={"learning_rate": 1.0}).to_json())
    with pytest.raises(Refusal, match=r"optim\.learning_rate differ"):
        send(plan())


def test_an_unfinished_run_may_be_submitted_again_with_other_resources(
    send: Callable[..., Submitted], tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path / "runs/tiny")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(plan().to_json())
    Ledger(paths, "batch", {"SLURM_JOB_ID": "1"}).write("saved", step=2)
    sent = send(plan(resources={"time_minutes": 30}))
    assert watch.wait_until_ended(sent.run, 180).state == "finished"
    assert [path.name for path in paths.plans.iterdir()] == ["001.json"]
    assert Plan.from_json(paths.plan.read_text()).resources.time_minutes == 30


@pytest.mark.parametrize(
    ("said", "job"),
    [
        ("Submitted batch job 12", "12"),
        (b"Submitted batch job 12 on cluster c1\n", "12"),
        ("12", "12"),
        ("12;c1", "12"),
        ("Welcome! 3 jobs may run.\nSubmitted batch job 45\nBye.", "45"),
    ],
)
def test_the_job_id_is_found_whatever_the_site_adds(said: str | bytes, job: str) -> None:
    assert ScriptExecutor._get_job_id_from_submission_command(said) == job


def test_a_submission_without_an_id_is_an_error() -> None:
    with pytest.raises(FailedSubmissionError):
        ScriptExecutor._get_job_id_from_submission_command("thank you")


def test_hints_name_something_to_do() -> None:
    assert all(len(hint) > 20 and part == part.lower() for part, hint in HINTS.items())


def test_the_python_that_submits_runs_the_job_unless_the_profile_sets_one_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCFT_PYTHON", raising=False)
    assert transport.job_environment(plan())["HPCFT_PYTHON"] == sys.executable
    assert "HPCFT_PYTHON" not in transport.job_environment(plan(resources={"setup": ("module load a",)}))
