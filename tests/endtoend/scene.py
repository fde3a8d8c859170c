"""A project folder with a small model, records and cluster profile, and what tests do in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcft.launch.watch import ENDED, AttemptStatus, RunStatus, status
from hpcft.run.ledger import Event, read_events
from hpcft.run.paths import RunPaths
from hpcft.slurm.states import State
from tests import tiny
from tests.loopback import LoopbackSlurm

ROOT = Path(__file__).resolve().parents[2]

# The loopback profile as the tests want it: the warning before the time limit as early as a test run needs it.
PROFILE = (ROOT / "templates" / "clusters" / "loopback.yaml").read_text(encoding="utf-8")

# A Qwen2 shape of 1.3 M weights: at least three reduction buckets, and steps of a few hundredths of a second.
SHAPE: dict[str, int] = {"vocabulary": 2048, "hidden": 128, "layers": 4}

RUN: dict[str, Any] = {
    "model": "./model",
    "from_scratch": True,
    "torch_dtype": "float32",
    "max_length": 256,
    "truncation_strategy": "truncate_right",
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": "none",
    "lora_dropout": 0.1,
    "global_batch_size": 8,
    "save_steps": 0,
    "nodes": 2,
    "nproc_per_node": 2,
    "time": 20,
    "cluster": "./loopback.yaml",
}


class Scene:
    """A folder in which runs are submitted to ``slurm``; ``run`` holds the keys that every run here has."""

    def __init__(self, folder: Path, slurm: LoopbackSlurm, run: Mapping[str, Any] = RUN) -> None:
        self.folder, self.slurm, self.keys = folder, slurm, dict(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "loopback.yaml").write_text(PROFILE, encoding="utf-8")

    def model(self, texts: Sequence[str], **shape: int) -> None:
        """Write the model folder, its tokenizer trained on ``texts``."""
        tiny.write_model(self.folder / "model", texts, **(SHAPE | shape))

    def hpcft(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One hpcft command line in the folder, with this checkout and this interpreter."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environ = {**self.slurm.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        environ.pop("HPCFT_RUN", None)
        done = subprocess.run(
            [sys.executable, "-m", "hpcft.cli.main", *words],
            cwd=self.folder, env=environ, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"hpcft {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, name: str, **keys: Any) -> str:
        """Submit a run called ``name``; returns its job id."""
        return self.hpcft("submit", "--name", name, *words(self.keys | keys)).stdout.split()[0]

    def paths(self, name: str) -> RunPaths:
        return RunPaths(self.folder / "runs" / name)

    def events(self, name: str) -> list[Event]:
        return read_events(self.paths(name))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Every line that the run wrote, in order; empty before the first."""
        file = self.paths(name).metrics
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [row for line in lines if (row := _row(line)) is not None]

    def losses(self, name: str) -> dict[int, float]:
        """Optimizer step → training loss."""
        return {row["step"]: row["loss"] for row in self.metrics(name) if "loss" in row}

    def step(self, name: str) -> int:
        """The newest optimizer step that was taken."""
        return max(self.losses(name), default=0)

    def status(self, name: str) -> RunStatus | None:
        """How the run stands; None before it has a folder. In this process: `hpcft status` every moment is work."""
        folder = self.paths(name).root
        return status(folder) if folder.is_dir() else None

    def attempts(self, name: str) -> tuple[AttemptStatus, ...]:
        """The attempts that have begun, oldest first."""
        now = self.status(name)
        return now.attempts if now else ()

    def wait(self, true: Callable[[], bool], seconds: float, what: str, name: str = "") -> None:
        """Wait until ``true()``. Raises AssertionError with the run's own words."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds:g} s for {what}\n{self.words_of(name) if name else ''}")
            time.sleep(0.5)

    def wait_for_step(self, name: str, step: int, seconds: float = 300) -> None:
        """Wait until the run has taken ``step``."""
        self.wait(lambda: self.step(name) >= step, seconds, f"step {step} of {name}", name)

    def wait_for_save(self, name: str, step: int, seconds: float = 300) -> None:
        """Wait until the run has published a checkpoint of ``step`` or later."""

        def saved() -> bool:
            return any(event["event"] == "saved" and event["step"] >= step for event in self.events(name))

        self.wait(saved, seconds, f"a checkpoint of {name} at step {step}", name)

    def wait_for_attempt(self, name: str, number: int, seconds: float = 300) -> None:
        """Wait until attempt ``number`` of the run has begun."""
        self.wait(lambda: len(self.attempts(name)) >= number, seconds, f"attempt {number} of {name}", name)

    def wait_for_job(self, job: str, states: Collection[State], seconds: float, name: str) -> State:
        """Wait until Slurm has the job in one of ``states``; returns it."""
        self.wait(lambda: self.slurm.state(job) in states, seconds, f"the end of job {job}", name)
        return self.slurm.state(job)

    def wait_for_end(self, name: str, seconds: float = 600) -> str:
        """Wait until the run is finished, cancelled or stopped; returns which."""

        def ended() -> bool:
            now = self.status(name)
            return now is not None and now.state in ENDED

        self.wait(ended, seconds, f"the end of {name}", name)
        now = self.status(name)
        assert now is not None
        return now.state

    def preempt(self, nodes: int = 4) -> None:
        """Let a job of higher priority take every node for a moment, and wait until it has had them."""
        started = self.folder / "high-started"
        started.unlink(missing_ok=True)
        body = f"touch {started}; sleep 1"
        self.slurm.submit(body, "-p", "high", "--exclusive", f"-N{nodes}", cwd=self.folder)
        self.wait(started.exists, 300, "the job of higher priority to start")

    def words_of(self, name: str) -> str:
        """What a person would look at: batch log, rank logs, events, the queue."""
        logs = sorted(self.paths(name).root.glob("logs/**/*.log")) + sorted(self.folder.glob(f"*{name}-*.log"))
        parts = [f"--- {log.relative_to(self.folder)}\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
        events = "\n".join(json.dumps(event) for event in self.events(name)[-40:])
        queue = self.slurm.run(["squeue", "-l"], check=False).stdout
        return "\n".join([*parts, "--- events", events, "--- queue", queue])


def words(keys: Mapping[str, Any]) -> list[str]:
    """Keys as the words of a command line."""
    said: list[str] = []
    for key, value in keys.items():
        said.append(f"--{key}")
        said += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return said


def real_records(*names: str, rows: int = 500) -> list[str] | None:
    """So many rows of each of these real files; None where this machine does not have them."""
    folder = Path(os.environ.get("HPCFT_REAL_DATA", ROOT.parent / "shared" / "data"))
    files = [folder / name for name in names]
    return [f"{file}#{rows}" for file in files] if all(file.is_file() for file in files) else None


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # the last line while it is being written
        return None
    return row if isinstance(row, dict) else None
