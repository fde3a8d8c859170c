"""Where an export comes from: run, data, checkpoint, losses, software. hpcft.json holds it, the card tells it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from hpcft.plan.plan import Plan, Source
from hpcft.plan.steps import total_steps
from hpcft.run.manifest import Manifest
from hpcft.run.paths import RunPaths
from hpcft.train.metrics import read_metrics
from hpcft.train.pick import MERGED, Identity
from hpcft.train.software import software
from hpcft.train.speech import Speech
from hpcft.train.weights import Written

SCHEMA = 1


def facts(
    plan: Plan,
    paths: RunPaths,
    manifest: Manifest,
    identity: Identity,
    windows: int | None,
    speech: Speech,
    written: Written,
) -> dict[str, Any]:
    """Everything the card tells. windows: of the training split, None where the prepared data is not at hand."""
    total = total_steps(plan.optim, windows, plan.batch.global_windows) if windows else None
    return {
        "schema": SCHEMA,
        "run": plan.name,
        "export": asdict(identity),
        "plan": manifest.plan,
        "data": {
            "content": manifest.data,
            "train": _sources(plan.data.train),
            "validation": _sources(plan.data.validation),
        },
        "base": {
            "path": plan.model.path,
            "source": plan.model.source,
            "revision": plan.model.revision,
            "from_scratch": plan.model.from_scratch,
            "quantization": plan.model.quantization,
        },
        "tuner": asdict(plan.tuner) if plan.tuner.kind == "lora" else {"kind": "full"},
        "training": _training(plan, manifest, total, windows),
        "losses": _losses(paths, manifest),
        "stop_tokens": dict(speech.stops),
        "learned_stop_tokens": dict(speech.learned),
        "weights": written.parameters,
        "reload": asdict(written.reloaded),
        "merge": asdict(written.merged) if written.merged else None,
        "quantised": asdict(written.quantised) if written.quantised else None,
        "versions": {"trained": dict(manifest.versions), "exported": _versions()},
        "command": _command(plan, identity),
    }


def _sources(sources: tuple[Source, ...]) -> list[dict[str, Any]]:
    """A local file by its name alone: where it lay concerns nobody the folder is given to."""
    return [
        {
            "path": PurePosixPath(s.path).name if s.source == "local" else s.path,
            "source": s.source,
            "rows": s.rows,
            "revision": s.revision,
        }
        for s in sources
    ]


def _training(plan: Plan, manifest: Manifest, total: int | None, windows: int | None) -> dict[str, Any]:
    at = manifest.progress
    return {
        "objective": plan.train.objective,
        "step": manifest.step,
        "total_steps": total,
        "epochs": round(at["consumed"] / windows, 4) if windows else None,
        "tokens": at["tokens"],
        "trained_tokens": at["trained_tokens"],
        "global_batch_windows": plan.batch.global_windows,
        "max_length": plan.data.max_length,
        "packing": plan.data.packing,
        "system": plan.data.system,
        "learning_rate": plan.optim.learning_rate,
        "schedule": plan.optim.schedule,
        "compute": plan.model.dtype,
        "strategy": plan.train.strategy,
        "ranks": manifest.layout["nodes"] * manifest.layout["ranks_per_node"],
        "seed": plan.train.seed,
    }


def _losses(paths: RunPaths, manifest: Manifest) -> dict[str, Any]:
    """The last ones up to the checkpoint, and the best evaluation so far."""
    lines = [line for line in read_metrics(paths.metrics) if line["step"] <= manifest.step]
    found: dict[str, Any] = {}
    for key in ("loss", "eval_loss"):
        if told := [line for line in lines if line.get(key) is not None]:
            found[key], found[f"{key}_step"] = told[-1][key], told[-1]["step"]
    if manifest.progress.get("best_loss") is not None:
        found["best_eval_loss"] = manifest.progress["best_loss"]
        found["best_eval_loss_step"] = manifest.progress["best_step"]
    return found


def _versions() -> dict[str, str]:
    import peft

    return {**software(), "peft": peft.__version__}


def _command(plan: Plan, identity: Identity) -> str:
    """How to make this folder again, from where the run was submitted."""
    words = [f"hpcft export {plan.name} --checkpoint {identity.step}"]
    words += ["--merge"] if identity.kind == MERGED else []
    return " ".join([*words, f"--dtype {identity.dtype}"])
