"""recorded.json: what only the node can know, found by the first attempt and kept by later ones on the same device.

A later attempt that found another kernel would sum in another order, and its losses would no longer be the first's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from hpcft import disk


def recorded(file: Path, name: str, device: torch.device, find: Callable[[], str]) -> str:
    """The value of ``name`` recorded for this model of device; ``find`` is asked, and its answer kept, the first time.

    Called by rank 0 alone, which tells the others.
    """
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = _read(file)
    mine = facts.setdefault(model, {})
    if name not in mine:
        mine[name] = find()
        _write(file, facts)
    return mine[name]


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write(file: Path, facts: dict[str, dict[str, str]]) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk.replace(file, json.dumps(facts, indent=2) + "\n")
