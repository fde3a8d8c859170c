"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.train.strategies import ddp
from tests.train import small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen2, configuration only: runs begin from scratch."""
    return small.save_model(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout in its attention, so that random numbers matter."""
    return small.save_model(tmp_path_factory.mktemp("model") / "dropout", attention_dropout=0.2)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several reduction buckets even in a tiny model: with one there is no order of summation to get wrong."""
    monkeypatch.setattr(ddp, "BUCKET_BYTES", 40_000)
