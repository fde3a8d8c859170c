"""The job that prepares data: what is said of it, and what it says itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.errors import Refusal
from hpcft.launch import logs, prepare, watch
from hpcft.launch import preparation as module
from hpcft.launch.preparation import WAITS, preparation
from hpcft.launch.render import render_preparation
from hpcft.plan.plan import PreparePlan
from hpcft.run.ledger import ATTEMPT_VARIABLE, JOB_VARIABLE, Ledger, read_events
from hpcft.run.paths import STORE_VARIABLE, RunPaths
from hpcft.slurm.states import State
from tests.plans import plan

JOB = PreparePlan(partition="cpu", qos=None, cores=4, memory="8G", time_minutes=60, extra=())


@pytest.fixture
def waiting(tmp_path: Path) -> RunPaths:
    """A run whose job 8 waits for job 7, which prepares its data."""
    paths = RunPaths(tmp_path)
    paths.jobs.mkdir()
    (paths.jobs / "8_submission.sh").write_text("x")
    Ledger(paths, "submit", {JOB_VARIABLE: "8"}).write(WAITS, preparation="7", batch_log="prepare-x-7.log")
    return paths


def states(monkeypatch: pytest.MonkeyPatch, preparing: State, training: State) -> None:
    for asks in (module, watch):
        monkeypatch.setattr(asks, "job_state", {"7": preparing, "8": training}.__getitem__)


def says(paths: RunPaths, event: str, **facts: object) -> None:
    Ledger(paths, "prepare", {JOB_VARIABLE: "7"}).write(event, **facts)


def test_a_run_that_waits_for_its_data_is_preparing(waiting: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (State.PENDING, State.RUNNING):
        states(monkeypatch, state, State.PENDING)
        now = watch.status(waiting.root)
        assert (now.state, now.alive, now.job) == ("preparing", True, "8")
        assert f"job 7, {state.name.lower()}" in now.why


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (State.TIMEOUT, "time limit"),
        (State.OUT_OF_MEMORY, "out of memory"),
        (State.CANCELLED, "its job was cancelled"),
        (State.NODE_FAIL, "it ended as node_fail"),
        (State.FORGOTTEN, "without a word"),
    ],
)
@pytest.mark.parametrize("training", [State.PENDING, State.CANCELLED, State.FORGOTTEN])
def test_a_preparation_that_slurm_ended_has_stopped_the_run(
    state: State, why: str, training: State, waiting: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(monkeypatch, state, training)
    says(waiting, prepare.BEGAN)
    now = watch.status(waiting.root)
    assert now.state == "stopped"
    assert why in now.why
    assert "prepare-x-7.log" in now.why


def test_a_preparation_that_failed_says_why_and_one_that_began_anew_is_asked_again(
    waiting: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(monkeypatch, State.RUNNING, State.PENDING)
    says(waiting, prepare.FAILED, why="a.jsonl:3: broken JSON")
    assert "a.jsonl:3: broken JSON" in watch.status(waiting.root).why
    says(waiting, prepare.BEGAN)
    assert watch.status(waiting.root).state == "preparing"
    says(waiting, prepare.PREPARED)
    assert watch.status(waiting.root).state == "pending"
    assert preparation(waiting, read_events(waiting), "8") is None


def test_a_run_that_has_begun_waits_for_nothing(waiting: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    states(monkeypatch, State.FORGOTTEN, State.PENDING)
    Ledger(waiting, "batch", {JOB_VARIABLE: "8"}).write("accepted", plan="x", store=None)
    assert watch.status(waiting.root).state == "pending"


def test_a_controller_that_is_away_is_no_failure(waiting: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    states(monkeypatch, State.UNKNOWN, State.UNKNOWN)
    assert watch.status(waiting.root).state == "unknown"


def test_the_job_ends_with_the_code_of_the_preparation_and_keeps_its_words(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    environ = {JOB_VARIABLE: "7", STORE_VARIABLE: str(tmp_path / "store")}
    text = plan(data={"tokenizer": str(tmp_path / "nowhere")}).to_json()
    assert prepare.prepare(text, paths, {**environ, "PYTHONPATH": str(Path.cwd())}, 1) == 2
    began, failed = read_events(paths)
    assert (began["event"], failed["event"], failed["job"]) == (prepare.BEGAN, prepare.FAILED, "7")
    assert "no such folder for the tokenizer" in failed["why"]
    log = paths.prepare_log("7")
    assert failed["log"] == str(log)
    assert "no such folder for the tokenizer" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_in_the_training_job_what_is_the_datas_fault_is_refused_and_anything_else_is_a_failure(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    environ = {JOB_VARIABLE: "7", ATTEMPT_VARIABLE: "1", STORE_VARIABLE: str(tmp_path / "store")}
    environ["PYTHONPATH"] = str(Path.cwd())
    assert prepare.prepare(plan(data={"tokenizer": str(tmp_path / "nowhere")}).to_json(), paths, environ) == 2
    assert "no such folder for the tokenizer" in read_events(paths)[-1]["refused"]
    (tmp_path / "file").write_text("no folder")
    assert prepare.prepare(plan().to_json(), paths, {**environ, STORE_VARIABLE: str(tmp_path / "file/store")}) == 1
    assert read_events(paths)[-1]["event"] == "failed"


def test_while_an_attempt_prepares_its_data_that_is_what_its_log_shows(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    ledger = Ledger(paths, "batch", {JOB_VARIABLE: "7", ATTEMPT_VARIABLE: "1"})
    ledger.write("attempt_began", restart=0)
    paths.attempt(1).mkdir(parents=True)
    log = paths.prepare_log("7")
    log.write_text("tokenising\n")
    ledger.write(prepare.BEGAN, log=str(log))
    assert list(logs.read(paths)) == ["tokenising"]
    assert list(logs.follow(paths, lambda: True, look=0.01)) == ["== attempt 1", "== preparing the data", "tokenising"]
    paths.rank_log(1, 0).write_text("step 1\n")
    assert list(logs.read(paths)) == ["step 1"]
    assert list(logs.follow(paths, lambda: True, look=0.01)) == ["== attempt 1", "step 1"]


def test_the_script_of_the_preparation_asks_for_no_gpu_and_carries_the_plan() -> None:
    asked = plan(resources={"prepare": "job", "prepare_job": JOB, "gpus_per_node": 8, "gpu_request": "gres"})
    text = render_preparation(asked)
    assert "--gres" not in text
    assert "#SBATCH --partition=cpu\n" in text
    assert "#SBATCH --cpus-per-task=4\n" in text
    assert asked.to_json() in text


def test_a_cluster_without_such_a_job_renders_none() -> None:
    with pytest.raises(Refusal, match="prepares data without a job of its own") as refusal:
        render_preparation(plan())
    assert "prepare: job" in refusal.value.problems[0].hint


def test_the_cause_is_the_first_error_or_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text, cause in (
        ("reading a\nError: a.jsonl:3: broken\n  hint: x\nError: b\n", "a.jsonl:3: broken"),
        ("Traceback\nOSError: No space left on device\n\n", "OSError: No space left on device"),
        ("", "it ended without a word"),
    ):
        log.write_text(text)
        assert prepare.cause(log) == cause
