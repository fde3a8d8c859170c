"""A sweep as one job array, with the real trainer: an element that is preempted goes on as itself."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hpcft.config.load import load_cluster, load_run
from hpcft.launch.sweep import submit_sweep
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from hpcft.slurm.job import show_job
from tests.endtoend.scene import ROOT, Scene, words

STEPS = 150  # the preemption, seconds after the fifth, must not find the run at its end
# The last two are twins: the one is disturbed, the other is not. The last has the array's own number for its job id.
RATES = {"fast": "4e-3", "calm": "2e-3", "preempted": "2e-3"}


def plan_of(scene: Scene, name: str, **keys: Any) -> Plan:
    loaded = load_run(["--name", name, *words(scene.keys | keys)])
    return make_plan(loaded.run, load_cluster("./loopback.yaml")[0], loaded.origins)


@pytest.mark.slow
def test_a_preempted_element_resumes_as_itself_and_the_others_run_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"nodes": 1, "nproc_per_node": 1, "exclusive": "true", "partition": "low", "max_steps": STEPS}
    keys |= {"dataloader_num_workers": 3}  # of a node's four cores: the rank computes on one
    monkeypatch.chdir(scene.folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    scene.hpcft("prepare", *words(scene.keys))
    plans = [plan_of(scene, name, learning_rate=rate, **keys) for name, rate in RATES.items()]
    sent = submit_sweep("rates", plans)
    jobs = {one.run.name: one.job_id for one in sent.submitted}
    assert list(jobs) == list(RATES)

    scene.wait_for_step("preempted", 5)
    node = show_job(jobs["preempted"]).node_list
    scene.slurm.submit("sleep 1", "-p", "high", "--exclusive", f"--nodelist={node}", cwd=scene.folder)
    scene.wait_for_attempt("preempted", 2)
    for name in RATES:
        assert scene.wait_for_end(name) == "finished"
        now = scene.status(name)
        assert now is not None
        assert (now.job, now.step, now.total) == (jobs[name], STEPS, STEPS)

    first, second = scene.attempts("preempted")
    assert (first.ending, first.job, second.job, second.restart) == ("preempted", *[jobs["preempted"]] * 2, 1)
    assert first.last_saved
    assert second.first_step == first.last_saved
    assert scene.losses("preempted") == scene.losses("calm")
    taken = [row["step"] for row in scene.metrics("preempted") if "loss" in row]
    assert sorted(taken) == list(range(1, STEPS + 1)), "no step is done twice"
    for name in ("fast", "calm"):
        assert [(attempt.job, attempt.restart) for attempt in scene.attempts(name)] == [(jobs[name], 0)]
        assert {event["job"] for event in scene.events(name)} == {jobs[name]}
    last = {name: scene.losses(name)[STEPS] for name in RATES}
    assert len(set(last.values())) == 2, "each run has its own learning rate"
