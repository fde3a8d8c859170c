"""What a base in 8-bit floats costs in loss: LoRA on it beside LoRA on the same base in bfloat16, step by step.

    python -m benchmarks.precision --folder SCRATCH [--steps 200] [--cpu]

A small model learns a made language (whole, in float32 masters), is written down, and then learns another one by
adapters, once for each precision, on the same windows in the same order. Both languages are chains: every token has a
few successors of its own, so the least loss that there can be is known. --cpu: with the arithmetic's twin on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import device
from benchmarks.made import Prepared, Windows
from benchmarks.ranks import run_ranks, visible
from benchmarks.task import RESULT, make
from hpcft.data.shards import Window
from hpcft.plan.plan import Plan

SHAPE: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SUCCESSORS, LENGTH, WINDOWS = 4, 512, 4  # of a token; tokens of a window; windows of an optimizer step
FULL = "--tuner_type full --learning_rate 1e-3"
LORA = "--tuner_type lora --lora_rank 8 --lora_dropout 0 --learning_rate 2e-3"
PLAN, MODEL = "plan.json", "model.safetensors"


@dataclass(frozen=True)
class Language:
    """A chain over the vocabulary. changed: the share of tokens whose successors are not those of the first one."""

    changed: float

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Successors [vocabulary, SUCCESSORS], and how likely each is, up to it."""
        draw, vocabulary = np.random.default_rng(0), SHAPE["vocab_size"]
        first, others = (draw.integers(0, vocabulary, (vocabulary, SUCCESSORS)) for _ in range(2))
        likely = draw.dirichlet(np.ones(SUCCESSORS), vocabulary)
        apart = draw.random(vocabulary) < self.changed
        return np.where(apart[:, None], others, first), likely.cumsum(1)

    def text(self, seed: int, length: int) -> np.ndarray:
        draw, (successors, likely) = np.random.default_rng(seed), self.table()
        tokens, chance = [int(draw.integers(SHAPE["vocab_size"]))], draw.random(length)
        for n in range(1, length):
            at = min(int(np.searchsorted(likely[tokens[-1]], chance[n])), SUCCESSORS - 1)
            tokens.append(int(successors[tokens[-1], at]))
        return np.array(tokens, np.int32)


class Texts(Windows):
    """Windows of a language, one document each."""

    def __init__(self, number: int, language: Language) -> None:
        super().__init__(number, LENGTH, SHAPE["vocab_size"])
        self.language = language

    def _made(self, index: int) -> Window:
        made = super()._made(index)
        return Window(self.language.text(index, self.length), made.trained, made.documents, made.kinds, [0.0])


def rank(file: Path, changed: float) -> None:
    """Train by the Plan in ``file``; write every loss, and of a model that is trained whole its weights."""
    from hpcft.run.paths import RunPaths
    from hpcft.train import assemble, loop, world
    from hpcft.train.signals import Signals

    plan = Plan.from_json(file.read_text())
    here = world.join(plan, os.environ)
    texts = Texts(plan.optim.max_steps * plan.batch.global_windows, Language(changed))
    run = assemble.assemble(plan, RunPaths(file.parent), here, Signals(), os.environ, prepared=Prepared(texts))
    losses = []
    while not run.finished:
        losses.append(loop.optimizer_step(run, next(run.steps)).mean_loss)
    if plan.tuner.kind == "full":
        from safetensors.torch import save_file

        weights = {name: t.detach().cpu().contiguous() for name, t in run.sharded.model.named_parameters()}
        save_file(weights, file.parent / MODEL, metadata={"format": "pt"})
        (file.parent / "config.json").write_text(json.dumps(SHAPE))
    (file.parent / RESULT).write_text(json.dumps(losses))


def trained(place: Path, model: Path, words: str, changed: float, given: argparse.Namespace) -> list[float]:
    """The losses of a process of its own. Raises SystemExit with the end of its log when it fails."""
    place.mkdir(parents=True, exist_ok=True)
    every = f"--max_length {LENGTH} --global_batch_size {WINDOWS} --max_steps {given.steps} --torch_dtype bfloat16"
    (place / PLAN).write_text(make([*every.split(), *words.split()], model, 1, given.cpu).to_json())
    call = ["--rank", str(place / PLAN), "--changed", str(changed)]
    if failed := run_ranks("benchmarks.precision", call, 1, place, given.limit, visible(1)):
        raise SystemExit(failed)
    return list(json.loads((place / RESULT).read_text()))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of one training")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--changed", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.rank:
        rank(given.rank, given.changed)
        sys.stdout.flush()
        os._exit(0)
    shape = given.folder / "shape"
    shape.mkdir(parents=True, exist_ok=True)
    (shape / "config.json").write_text(json.dumps(SHAPE))
    base = given.folder / "base"
    learned = trained(base, shape, f"{FULL} --from_scratch true", 0.0, given)
    print(f"{device.said(device.facts(given.cpu))}\n\nthe base: loss {learned[0]:.3f} → {mean(learned[-10:]):.3f}")
    curves = {
        name: np.array(trained(given.folder / name, base, f"{LORA} {words}", 0.5, given))
        for name, words in (("bfloat16", ""), ("fp8", "--base_precision fp8"))
    }
    plain, eight = curves["bfloat16"], curves["fp8"]
    off = (eight - plain) / plain
    print("| steps | loss, bfloat16 | loss, fp8 | difference |\n| --- | --- | --- | --- |")
    for part in np.array_split(np.arange(len(plain)), min(5, len(plain))):
        print(f"| {part[0] + 1} to {part[-1] + 1} | {plain[part].mean():.4f} | {eight[part].mean():.4f} "
              f"| {off[part].mean():+.2%} |")  # fmt: skip
    print(f"\nlargest difference of a step {np.abs(off).max():.2%}, mean {off.mean():+.3%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
