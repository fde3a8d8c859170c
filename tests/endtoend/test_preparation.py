"""Data prepared by a job of its own: the training waits for it, and hears when it fails."""

from __future__ import annotations

import json
import time

import pytest

from hpcft.slurm.states import State
from tests.endtoend.scene import PROFILE, Scene, words

GONE = (State.CANCELLED, State.COMPLETED, State.FAILED, State.FORGOTTEN)
JOB = "prepare: job\nprepare_job: {{cores: 2, mem: null, time: 10, extra: [{extra}]}}\n"
SHORT = {"nodes": 1, "nproc_per_node": 1, "max_steps": 4, "cluster": "./cpu.yaml"}


@pytest.fixture
def prepared_by_job(scene: Scene) -> Scene:
    (scene.folder / "cpu.yaml").write_text(PROFILE + JOB.format(extra=""))
    (scene.folder / "held.yaml").write_text(PROFILE + JOB.format(extra="--hold"))
    return scene


def preparation_of(scene: Scene, name: str) -> str:
    waits = [event for event in scene.events(name) if event["event"] == "waits_for_preparation"]
    return str(waits[-1]["preparation"])


@pytest.mark.slow
def test_the_training_begins_when_the_job_before_it_has_prepared_the_data(prepared_by_job: Scene) -> None:
    scene = prepared_by_job
    done = scene.hpcft("submit", "--name", "after", *_words(scene, seed=11))
    assert "prepares its data first" in done.stderr
    assert scene.wait_for_end("after") == "finished", scene.words_of("after")
    events = [event["event"] for event in scene.events("after")]
    assert events.index("prepared") < events.index("accepted")
    again = scene.hpcft("submit", "--name", "after-again", *_words(scene, seed=11))
    assert "prepares its data first" not in again.stderr
    scene.hpcft("cancel", "after-again")


@pytest.mark.slow
def test_a_failed_preparation_ends_the_run_and_says_why_and_where_it_is_written(prepared_by_job: Scene) -> None:
    scene = prepared_by_job
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    broken = scene.folder / "broken.jsonl"
    broken.write_text(f"{good}\n{good}\n{{oops\n")
    said = _words(scene, dataset=["broken.jsonl"], split_dataset_ratio=0)
    job = scene.hpcft("submit", "--name", "broken", *said).stdout.split()[0]
    assert scene.wait_for_end("broken") == "stopped"
    page = scene.hpcft("status", "broken").stdout
    assert "preparing the data failed" in page
    assert "broken.jsonl:3: broken JSON" in page
    log = scene.paths("broken").prepare_log(preparation_of(scene, "broken"))
    assert str(log) in page
    assert "broken JSON" in scene.hpcft("logs", "broken").stdout
    assert scene.attempts("broken") == ()
    broken.write_text(f"{good}\n" * 40)
    assert scene.hpcft("submit", "--name", "broken", *said).stdout.split()[0] != job  # nothing old is in its way
    assert scene.wait_for_end("broken") == "finished"
    scene.wait_for_job(job, GONE, 180, "broken")


def test_cancelling_a_run_that_waits_for_its_data_ends_both_jobs_and_resume_starts_both(prepared_by_job: Scene) -> None:
    scene = prepared_by_job
    said = _words(scene, seed=12, cluster="./held.yaml")
    job = scene.hpcft("submit", "--name", "held", *said).stdout.split()[0]
    before = preparation_of(scene, "held")
    assert f"preparing (job {before}, pending" in scene.hpcft("status", "held").stdout
    scene.hpcft("cancel", "held")
    for number in (job, before):
        scene.wait_for_job(number, GONE, 180, "held")
    assert scene.wait_for_end("held") == "cancelled"
    assert "prepares its data first" in scene.hpcft("resume", "held").stderr
    again = preparation_of(scene, "held")
    assert again != before
    scene.slurm.run(["scancel", again])  # by hand, and only the one that prepares
    end = time.monotonic() + 180
    while (now := scene.status("held")) is None or now.state != "stopped":
        assert time.monotonic() < end, now
        time.sleep(0.5)
    assert "its job was cancelled" in now.why


def _words(scene: Scene, **keys: object) -> list[str]:
    return words(scene.keys | SHORT | keys)
