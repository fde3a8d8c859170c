"""What a checkpoint and whoever goes on from it must share: settings, data, tensors.

No torch when it is imported: an export of the wrong run is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hpcft.catalog import OBJECTIVES
from hpcft.errors import refuse
from hpcft.plan.plan import Plan
from hpcft.run.manifest import Manifest

# What a manifest means that is older than the key.
MEANT: dict[str, dict[str, Any]] = {"model": {"quantization": "none", "main_params_dtype": "float32"}}


def facts(plan: Plan) -> dict[str, Any]:
    """What a resuming run must share with the run that saved, else its curve would silently be another one."""
    optim = asdict(plan.optim)
    return {
        "model": {
            "path": plan.model.path,
            "revision": plan.model.revision,
            "from_scratch": plan.model.from_scratch,
            "quantization": plan.model.quantization,
            # A checkpoint's numbers are float32 either way, but rounding them, or no longer rounding, is another curve.
            "main_params_dtype": plan.model.main_params_dtype,
        },
        "tuner": json.loads(json.dumps(asdict(plan.tuner))),
        "optim": optim,
        "train": {"objective": plan.train.objective, "seed": plan.train.seed},
        "objective": {
            **{key: getattr(plan.objective, key) for key in OBJECTIVES[plan.train.objective].keys},
            **({"labels": list(plan.objective.labels)} if plan.labelled else {}),
        },
        "batch": {"global_windows": plan.batch.global_windows},
    }


def check_facts(manifest: Manifest, plan: Plan, data: str) -> None:
    """Raises Refusal naming every difference between a checkpoint and the run that wants to go on from it."""
    then = {section: {**MEANT.get(section, {}), **values} for section, values in manifest.facts.items()}
    different = [
        f"{section}.{key}: {then.get(section, {}).get(key)!r} then, {value!r} now"
        for section, values in facts(plan).items()
        for key, value in values.items()
        if then.get(section, {}).get(key) != value
    ]
    if manifest.data != data:
        different.append(f"the prepared data: content {manifest.data[:12]} then, {data[:12]} now")
    if different:
        hint = "start a new run under another name, or set these back"
        if manifest.data != data:
            hint += "; where data and settings are the same, another release prepares data in another form"
        raise refuse("the checkpoint is of another run: " + "; ".join(different), where=str(manifest.folder), hint=hint)


def same_tensors(manifest: Manifest, now: Mapping[str, tuple[int, ...]]) -> None:
    """Raises Refusal where the checkpoint's tensors are not ``now``, the shapes of those that are trained."""
    then = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise refuse(
                f"{name} is {then.get(name, 'not there')} in the checkpoint, {now.get(name, 'not there')} in the model",
                where=str(manifest.folder),
                hint="has the model's folder, or peft, changed since the run began?",
            )
