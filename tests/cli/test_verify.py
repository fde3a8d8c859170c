"""``hpcft verify`` as a person types it: on two processes of this machine, and as a job of two nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.test_commands import hpcft, refused
from tests.endtoend.scene import Scene
from tests.loopback import LoopbackSlurm

FOUR = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "HSDP", "FSDP2×TP", "DDP×TP"]


@pytest.mark.slow
def test_on_this_machine_two_ranks_are_compared_with_one_and_nothing_is_left(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", ["some words"])
    line = "verify --model ./model --dataset a.jsonl --cluster local --nproc_per_node 2"
    done = hpcft(line, tmp_path)
    assert done.returncode == 0, done.stderr
    head, _, rows = done.stdout.partition("\n\n")
    assert head.startswith("model       qwen2 in miniature, LoRA trained")
    lines = [line.split() for line in rows.splitlines()[1:]]
    assert [line[0] for line in lines] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "TP"]
    assert {line[-1] for line in lines} == {"ok"}
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_on_slurm_the_job_is_waited_for_and_its_table_can_be_read_by_a_program(
    slurm: LoopbackSlurm, tmp_path: Path
) -> None:
    scene = Scene(tmp_path, slurm)
    scene.model(["some words"])
    line = "verify --json --model ./model --dataset a.jsonl --cluster ./loopback.yaml --nodes 2 --nproc_per_node 2"
    done = scene.hpcft(*line.split(), "--tuner_type", "full", "--time", "20")
    table = json.loads(done.stdout)
    assert (table["ok"], table["family"], table["kind"]) == (True, "qwen2", "full")
    assert [(row["strategy"], row["verdict"]) for row in table["rows"]] == [(name, "ok") for name in FOUR]
    assert "completed" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".log"] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("verify --model m --dataset a.jsonl --cluster local --nproc_per_node 1", "one rank is one process"),
        ("verify --modle m --dataset a.jsonl --cluster local", "did you mean model?"),
        ("verify --cluster local --nproc_per_node 2", "model"),
        ("verify nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_wrong_words_are_refused(line: str, said: str, tmp_path: Path) -> None:
    assert said in refused(line, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_table_with_one_strategy_that_differs_says_so_in_capitals() -> None:
    from hpcft.cli.verify import page
    from tests.plans import layout, plan

    row = {"strategy": "DDP", "axes": "dp 2", "dtype": "float32", "tolerance": 1e-5, "verdict": "differs"}
    table = {
        **{"family": "llama", "kind": "full", "device": "CPU", "versions": "torch 2", "note": "no config.json"},
        "rows": [
            {**row, "difference": 0.25, "note": ""},
            {**row, "verdict": "failed", "difference": None, "note": "?"},
        ],
    }
    said = page(plan(layout=layout(1, 2)), table)
    assert "not the run's own: no config.json" in said
    assert said.splitlines()[-2:] == [
        "DDP       dp 2  float32  2.5e-01     1e-05    DIFFERS",
        "DDP       dp 2  float32  –           1e-05    failed: ?",
    ]
