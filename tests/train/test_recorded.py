"""What the first attempt found out stays so for later ones on the same device."""

from __future__ import annotations

from pathlib import Path

import torch

from hpcft.train.recorded import recorded

CPU = torch.device("cpu")


def test_a_later_attempt_takes_what_the_first_one_found(tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    assert recorded(file, "attention", CPU, lambda: "sdpa") == "sdpa"
    assert recorded(file, "attention", CPU, lambda: "eager") == "sdpa"


def test_another_model_of_device_finds_its_own(tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    recorded(file, "attention", CPU, lambda: "sdpa")
    assert recorded(file, "attention", torch.device("meta"), lambda: "eager") == "eager"
    assert recorded(file, "attention", CPU, lambda: "eager") == "sdpa"


def test_a_torn_file_is_found_out_anew(tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    file.write_text('{"cpu": {"atten')
    assert recorded(file, "attention", CPU, lambda: "sdpa") == "sdpa"
