"""The preflight: which node is to blame, and what no node is to blame for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from hpcft.cli.submit import python_is_the_ranks
from hpcft.errors import Refusal
from hpcft.launch.preflight import (
    Report,
    compare,
    gpus_seen,
    inspect,
    judge,
    refuse_missing_packages,
    refuse_unprepared,
    versions,
)
from hpcft.plan.plan import Plan
from hpcft.run.ledger import read_events
from hpcft.run.paths import RunPaths
from tests.launch.conftest import furnish
from tests.plans import layout, plan

SAME = {"python": "3.11.9", "torch": "2.11.0"}
NODES = ["n1", "n2", "n3"]


def report(node: str, *faults: str, **versions: str) -> Report:
    return Report(node, {**SAME, **versions}, 2, list(faults))


def test_nodes_that_are_alike_are_fit() -> None:
    assert compare([report(node) for node in NODES], NODES).fit


def test_a_node_that_does_not_report_is_named() -> None:
    verdict = compare([report("n1"), report("n3")], NODES)
    assert verdict.faults == {"n2": ["did not report"]}


def test_a_node_with_another_version_is_named_with_both_versions() -> None:
    verdict = compare([report("n1"), report("n2", torch="2.10.0"), report("n3")], NODES)
    assert verdict.faults == {"n2": ["has torch 2.10.0, the other nodes 2.11.0"]}


def test_a_node_with_a_lost_gpu_is_named() -> None:
    verdict = compare([report("n1"), report("n2"), report("n3", "sees 1 of 2 GPUs")], NODES)
    assert verdict.faults == {"n3": ["sees 1 of 2 GPUs"]}
    assert not verdict.refused


def test_a_fault_of_every_node_is_no_nodes_fault() -> None:
    verdict = compare([report(node, "cannot read the prepared data") for node in NODES], NODES)
    assert verdict.refused == "every node: cannot read the prepared data"


def test_missing_data_and_a_missing_model_are_refused_with_the_command(tmp_path: Path) -> None:
    environ = {"HPCFT_STORE": str(tmp_path / "prepared"), "HPCFT_RUN": "runs/x"}
    chosen = plan(model={"path": str(tmp_path / "model")})
    with pytest.raises(Refusal, match="hpcft prepare"):
        refuse_unprepared(chosen, environ)
    furnish(tmp_path, chosen)
    refuse_unprepared(chosen, environ)
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(Refusal, match="no model is there"):
        refuse_unprepared(chosen, environ)


def test_a_model_that_cannot_be_read_is_refused_before_a_rank_is_started(tmp_path: Path) -> None:
    environ = {"HPCFT_STORE": str(tmp_path / "prepared"), "HPCFT_RUN": "runs/x"}
    chosen = plan(model={"path": str(tmp_path / "model"), "from_scratch": False})
    furnish(tmp_path, chosen)
    with pytest.raises(Refusal, match="no weights are there"):
        refuse_unprepared(chosen, environ)
    (tmp_path / "model/model.safetensors").write_bytes((100).to_bytes(8, "little") + b'{"a": ')
    with pytest.raises(Refusal, match="ends inside of its header"):
        refuse_unprepared(chosen, environ)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this Python does not find ``package``."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


ZERO = plan(train={"strategy": "zero2", "strategy_module": "hpcft.train.strategies.zero"})
NF4 = plan(model={"quantization": "nf4"})


FLASH = plan(model={"attention": "flash_attention_2"})


@pytest.mark.parametrize(("chosen", "package"), [(ZERO, "deepspeed"), (NF4, "bitsandbytes"), (FLASH, "flash_attn")])
def test_a_package_that_the_run_needs_is_refused_with_the_command_and_a_run_without_it_is_not(
    chosen: Plan, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("kernels", monkeypatch)
    without(package, monkeypatch)
    with pytest.raises(Refusal, match=f"pip install {package}"):
        refuse_missing_packages(chosen)
    refuse_missing_packages(plan())


def test_a_missing_package_is_the_runs_fault_and_no_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path / "run")
    chosen = dataclasses.replace(ZERO, model=dataclasses.replace(ZERO.model, path=str(tmp_path / "model")))
    furnish(tmp_path, chosen)
    paths.attempt(1).mkdir(parents=True)
    environ = {"HPCFT_ATTEMPT": "1", "SLURM_JOB_NODELIST": "n1", "HPCFT_STORE": str(tmp_path / "prepared")}
    (paths.attempt(1) / "preflight-n1.json").write_text(json.dumps(dataclasses.asdict(report("n1"))))
    without("deepspeed", monkeypatch)
    with pytest.raises(Refusal, match="zero2 needs deepspeed"):
        judge(chosen, paths, environ, code=0)
    assert [(event["ok"], event["bad_nodes"]) for event in read_events(paths)] == [(False, [])]


def test_nodes_tell_each_other_the_version_of_what_the_run_needs(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.attempt(1).mkdir(parents=True)
    assert "deepspeed" in inspect(ZERO, paths, {"HPCFT_ATTEMPT": "1"}).versions


def test_this_machine_reports_itself_without_importing_torch(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.attempt(1).mkdir(parents=True)
    found = inspect(plan(), paths, {"HPCFT_ATTEMPT": "1", "SLURMD_NODENAME": "n2"})
    assert (found.node, found.faults) == ("n2", [])
    assert found.versions["python"]
    assert found.versions == versions()


def test_a_run_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    assert "cannot write" in inspect(plan(), RunPaths(tmp_path), {"HPCFT_ATTEMPT": "1"}).faults[0]


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcft.launch.preflight._gpus_of_machine", lambda: 8)
    assert gpus_seen({}) == 8
    assert gpus_seen({"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert gpus_seen({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_the_verdict_goes_into_the_ledger(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    chosen = plan(layout=layout(2, 1), resources={"nodes": 2}, model={"path": str(tmp_path / "model")})
    furnish(tmp_path, chosen)
    paths.attempt(1).mkdir(parents=True)
    environ = {
        **{"HPCFT_ATTEMPT": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"},
        "HPCFT_STORE": str(tmp_path / "prepared"),
    }
    assert judge(chosen, paths, environ, code=143) == 143  # nobody reported: a signal, nothing to judge
    one = {"node": "n1", "versions": SAME, "gpus": 0, "faults": []}
    (paths.attempt(1) / "preflight-n1.json").write_text(json.dumps(one))
    assert judge(chosen, paths, environ, code=1) == 4
    assert [event["bad_nodes"] for event in read_events(paths)] == [["n2"]]
    (paths.attempt(1) / "preflight-n2.json").write_text(json.dumps({**one, "node": "n2"}))
    assert judge(chosen, paths, environ, code=0) == 0
    assert read_events(paths)[-1]["ok"]


def test_the_login_side_looks_where_the_ranks_will_use_its_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCFT_PYTHON", raising=False)
    activated = plan(resources={"setup": ("source /venv/bin/activate",)})
    assert python_is_the_ranks(plan(), on_slurm=True)
    assert python_is_the_ranks(activated, on_slurm=False)
    assert not python_is_the_ranks(activated, on_slurm=True)
    monkeypatch.setenv("HPCFT_PYTHON", "/venv/bin/python")
    assert not python_is_the_ranks(plan(), on_slurm=True)
