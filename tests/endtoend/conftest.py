"""Scenes: a folder with a model and records for each module of tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import tiny
from tests.endtoend.scene import Scene, real_records
from tests.loopback import LoopbackSlurm


@pytest.fixture(scope="session")
def thorough() -> bool:
    """`make campaign`: every combination and many random moments, not the few that `make test` has time for."""
    return os.environ.get("HPCFT_CAMPAIGN") == "1"


@pytest.fixture(scope="module")
def scene(slurm: LoopbackSlurm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Records made here: words to be said in reverse."""
    place = Scene(tmp_path_factory.mktemp("scene"), slurm)
    rows = tiny.records(2000)
    tiny.write_records(place.folder / "train.jsonl", rows)
    place.model([json.dumps(row) for row in rows], vocabulary=512, hidden=64, layers=2)
    place.keys |= {"dataset": ["train.jsonl"], "split_dataset_ratio": 0.05, "max_length": 256, "tuner_type": "full"}
    return place


@pytest.fixture(scope="module")
def real_scene(slurm: LoopbackSlurm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Real instruction records in two languages, and a tokenizer trained on them; where they are not, made ones."""
    place = Scene(tmp_path_factory.mktemp("real"), slurm)
    real = real_records("alpaca_en_demo.json", "alpaca_zh_demo.json")
    sources = real or [str(tiny.write_records(place.folder / "made.jsonl", tiny.records(3000)))]
    texts = [Path(source.partition("#")[0]).read_text(encoding="utf-8") for source in sources]
    place.model([line for text in texts for line in text.splitlines()])
    place.keys |= {"dataset": sources, "split_dataset_ratio": 0.05}
    return place
