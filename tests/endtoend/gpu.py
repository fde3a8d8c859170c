"""One preemption on GPUs, on a real Slurm of two nodes: does the loss curve stay as it is, to the last bit?

    python -m tests.endtoend.gpu [--per-node 1] [--records FILE#500 …] [--cpu]

Starts a private Slurm whose nodes own real GPUs, trains LoRA and full with NCCL (deterministic: true), undisturbed and
preempted, compares every loss, and prints a table. Exit code 1 where they differ. --cpu rehearses it without GPUs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import tiny
from tests.endtoend.scene import PROFILE, Scene
from tests.loopback import LoopbackSlurm

STEPS = 200
# 29 M weights: eight reduction buckets.
SHAPE = {"vocabulary": 4096, "hidden": 512, "layers": 8}
GPU = {
    "accelerator": "cuda",
    "gpu_request": "gres",
    # The two "nodes" are one host that says it is two (NCCL_HOSTID): they meet over the network, as nodes do.
    "environment": {"NCCL_NVLS_ENABLE": "0"},
}
KEYS: dict[str, Any] = {
    "max_length": 1024,
    "global_batch_size": 16,
    "torch_dtype": "bfloat16",
    "deterministic": True,
    "split_dataset_ratio": 0.05,
    "eval_steps": 50,
    "max_steps": STEPS,
    "gradient_checkpointing": "full",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-node", type=int, default=1, help="GPUs of each of the two nodes")
    parser.add_argument("--records", nargs="*", default=[], help="data files; none: records made here")
    parser.add_argument("--cpu", action="store_true", help="rehearse without GPUs")
    given = parser.parse_args()
    gpus = 0 if given.cpu else given.per_node
    folder = Path(tempfile.mkdtemp(prefix="hpcft-gpu-"))
    with LoopbackSlurm(nodes=2, gpus=gpus, real_gpus=bool(gpus)) as slurm:
        os.environ.update({name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")})
        scene = prepare(folder, slurm, given.records, gpus)
        scene.keys |= {"nproc_per_node": given.per_node}
        rows = [compare(scene, tuner) for tuner in ("full", "lora")]
    print(report(rows, given.per_node, given.cpu))
    return 0 if all(row["equal"] for row in rows) else 1


def prepare(folder: Path, slurm: LoopbackSlurm, records: list[str], gpus: int) -> Scene:
    """Model, records, profile."""
    scene = Scene(folder, slurm)
    scene.keys |= KEYS
    if records:
        texts = [Path(r.partition("#")[0]).read_text(encoding="utf-8") for r in records]
        scene.keys["dataset"] = [str(Path(r).absolute()) for r in records]
    else:
        rows = tiny.records(5000)
        tiny.write_records(folder / "train.jsonl", rows)
        texts = [json.dumps(row) for row in rows]
        scene.keys["dataset"] = ["train.jsonl"]
    scene.model([line for text in texts for line in text.splitlines()], **SHAPE)
    if gpus:
        extra = GPU | {"gpus_per_node": gpus}
        kept = [line for line in PROFILE.splitlines() if line.partition(":")[0] not in extra]
        added = [f"{key}: {json.dumps(value)}" for key, value in extra.items()]
        (folder / "loopback.yaml").write_text("\n".join([*kept, *added]) + "\n", encoding="utf-8")
    else:
        scene.keys |= {"torch_dtype": "float32", "max_length": 128}
    return scene


def compare(scene: Scene, tuner: str) -> dict[str, Any]:
    """The same run undisturbed and preempted once, with grace."""
    keys = {"tuner_type": tuner} | ({"modules_to_save": ["lm_head", "embed_tokens"]} if tuner == "lora" else {})
    calm, hit = f"calm-{tuner}", f"preempted-{tuner}"
    begun = time.monotonic()
    scene.submit(calm, partition="batch", **keys)
    state = scene.wait_for_end(calm)
    print(f"{calm}: {state} after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if state != "finished":
        raise SystemExit(scene.words_of(calm))
    scene.submit(hit, partition="low", **keys)
    scene.wait_for_step(hit, STEPS // 4)
    scene.preempt(nodes=2)
    state = scene.wait_for_end(hit)
    print(f"{hit}: {state} after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if state != "finished":
        print(scene.words_of(hit), file=sys.stderr, flush=True)
    one, two = scene.losses(calm), scene.losses(hit)
    attempts = scene.attempts(hit)
    evaluations = [row["eval_loss"] for row in scene.metrics(calm) if "eval_loss" in row]
    taken = [row["step"] for row in scene.metrics(hit) if "loss" in row]
    speed = sorted(
        row["tokens_per_second"] for row in scene.metrics(calm) if "loss" in row and row["step"] > STEPS // 2
    )
    return {
        "tuner": tuner,
        "equal": len(one) == STEPS and one == two,
        "first_difference": next((step for step in sorted(one) if one[step] != two.get(step)), None),
        "resumed_at": attempts[-1].first_step,
        "attempts": len(attempts),
        "done_twice": len(taken) - len(set(taken)),
        "eval": (evaluations[0], evaluations[-1]) if evaluations else None,
        "tokens_per_second": round(speed[len(speed) // 2]) if speed else None,
    }


def report(rows: list[dict[str, Any]], per_node: int, cpu: bool) -> str:
    """A table for people, with what it was run on."""
    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [f"2 nodes × {per_node} {'CPU ranks' if cpu else device()}; Python {platform.python_version()}, {versions}"]
    lines += ["", "| tuner | losses equal to the bit | resumed at | steps done twice | eval loss | tokens/s |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        equal = f"{STEPS}/{STEPS}" if row["equal"] else f"NO, from step {row['first_difference']}"
        first, last = row["eval"] or (float("nan"), float("nan"))
        lines.append(
            f"| {row['tuner']} | {equal} | {row['resumed_at']} | {row['done_twice']} "
            f"| {first:.3f} → {last:.3f} | {row['tokens_per_second']:,} |"
        )
    return "\n".join(lines)


def device() -> str:
    import torch

    return torch.cuda.get_device_name(0)


if __name__ == "__main__":
    raise SystemExit(main())
