"""What a measurement was made on: device, driver, clocks, software."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from importlib import metadata
from statistics import median
from typing import Any

QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "memory.total")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "deepspeed", "bitsandbytes")


def gpu_query(fields: Sequence[str] = QUERY, only: str = "") -> list[dict[str, str]]:
    """What nvidia-smi says of every GPU, or of ``only`` these (0,1), by field; [] where there is none. Sets nothing."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += ["-i", only] if only else []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    rows = [line.split(", ") for line in answer.stdout.strip().splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


class Clocks:
    """SM clock in MHz and power in W of the GPUs in use, looked at once a second while something is measured."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            try:
                self.seen += gpu_query(("clocks.sm", "power.draw"), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            except (OSError, subprocess.SubprocessError):
                return

    def ended(self) -> dict[str, float]:
        """The medians; a GPU that does not say a number is left out."""
        self._over.set()
        numbers = {
            "clock": [_number(s["clocks.sm"]) for s in self.seen],
            "power": [_number(s["power.draw"]) for s in self.seen],
        }
        said = {name: [n for n in column if n is not None] for name, column in numbers.items()}
        return {name: median(column) for name, column in said.items() if column}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def host_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def kind_of(name: str) -> str:
    """h100, h200 … of a device's name; "cpu" for none of them."""
    return next((kind for kind in ("h100", "h200", "a100", "b200") if kind in name.lower()), "cpu")


def gpus() -> tuple[int, str]:
    """How many there are, and the name of the first; (0, "CPU") without one. Asking torch would take memory of it."""
    found = gpu_query(("name",))
    return len(found), found[0]["name"] if found else "CPU"


def facts(cpu: bool) -> dict[str, Any]:
    """Device and software, as every table of measurements says them."""
    count, name = (0, "CPU") if cpu else gpus()
    versions = {package: found for package in PACKAGES if (found := _version(package))}
    first = {} if cpu else next(iter(gpu_query()), {})
    return {"device": name, "count": count, "versions": versions, "gpu": first}


def said(facts: dict[str, Any]) -> str:
    """One line of them."""
    gpu = facts["gpu"]
    device = f"{facts['count']} × {facts['device']}" if facts["count"] else facts["device"]
    driver = (
        f", driver {gpu['driver_version']}, at most {gpu['clocks.max.sm']} MHz and {gpu['power.limit']} W"
        if gpu
        else ""
    )
    return f"{device}{driver}; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
