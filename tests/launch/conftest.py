"""A submit directory with everything that a job looks for, and a trainer that trains nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hpcft.plan.plan import Plan, data_key

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).parent / "standin"


def furnish(folder: Path, plan: Plan) -> None:
    """Lay out what the preflight looks for: a model's folder and the mark of prepared data."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text("{}")
    requests = folder / plan.folders.store / "requests"
    requests.mkdir(parents=True, exist_ok=True)
    (requests / f"{data_key(plan.data)}.json").write_text('{"content": "c", "inputs": []}')


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which ``hpcft.train.main`` is the stand-in, for this process and those it starts."""
    path = os.pathsep.join([str(STANDIN), str(ROOT)])
    variables = {"PYTHONPATH": path, "HPCFT_PYTHON": sys.executable}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables
