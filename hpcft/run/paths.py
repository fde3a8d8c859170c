"""A run on disk: every file and folder of it is named here, once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RUN_VARIABLE = "HPCFT_RUN"
RUNS_VARIABLE = "HPCFT_RUNS"  # the folder of an array's runs, each under its name
STORE_VARIABLE = "HPCFT_STORE"


@dataclass(frozen=True)
class RunPaths:
    """The files of the run whose folder is ``root``."""

    root: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> RunPaths:
        """The run that the script exported as HPCFT_RUN. Raises KeyError where it is not set."""
        return cls(Path((os.environ if environ is None else environ)[RUN_VARIABLE]).absolute())

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def plans(self) -> Path:
        """The plans that plan.json replaced, oldest first: 001.json, 002.json …"""
        return self.root / "plans"

    @property
    def script(self) -> Path:
        return self.root / "job.sbatch"

    @property
    def jobs(self) -> Path:
        """submitit's own files."""
        return self.root / "jobs"

    @property
    def handed_over(self) -> Path:
        """The plan as it was handed over, where no script in the folder carries it; the job writes ``plan``."""
        return self.jobs / "plan.json"

    @property
    def prepare_script(self) -> Path:
        return self.root / "prepare.sbatch"

    @property
    def prepare_jobs(self) -> Path:
        """submitit's files of the jobs that prepare data."""
        return self.root / "prepare-jobs"

    def prepare_log(self, job: str) -> Path:
        """What the preparation in that job says."""
        return self.root / "logs" / f"prepare-{job}.log"

    @property
    def lease(self) -> Path:
        return self.root / "lease.json"

    @property
    def recorded(self) -> Path:
        """What only the node could know, found by the first attempt: attention kernel, device model."""
        return self.root / "recorded.json"

    @property
    def events(self) -> Path:
        """One events-<writer>.jsonl per writer; readers merge them by time."""
        return self.root / "events"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def verified(self) -> Path:
        """What ``hpcft verify`` found, strategy by strategy; in a folder of its own, which is no run's."""
        return self.root / "verify.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """A hint at the newest checkpoint; readers verify it and fall back to scanning."""
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best"

    def reference(self, split: str) -> Path:
        """Log-probabilities of a split's documents before training, for objectives that compare with them."""
        return self.root / "reference" / f"{split}.npy"

    @property
    def exports(self) -> Path:
        return self.root / "export"

    @property
    def save_now(self) -> Path:
        """A file whose presence asks the ranks to save at the next step edge."""
        return self.root / "save-now"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def export(self, step: int, merged: bool = False) -> Path:
        return self.exports / (f"step-{step:06d}-merged" if merged else f"step-{step:06d}")

    def attempt(self, number: int) -> Path:
        """Logs of one attempt: rank-0000.log …, preflight-0000.log …, preflight-NODE.json, srun.log."""
        return self.root / "logs" / f"attempt-{number:03d}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"rank-{rank:04d}.log"
