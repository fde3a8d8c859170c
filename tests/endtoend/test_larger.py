"""A preference with a right answer: a model that names either of two numbers is taught to name the larger one."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.demo import answers
from tests import tiny
from tests.endtoend.scene import Scene
from tests.loopback import LoopbackSlurm

HELD_OUT = 400  # of the 4,005 pairs of numbers
COMMON: dict[str, Any] = {
    "tuner_type": "full", "max_length": 128, "truncation_strategy": "drop", "nodes": 1, "global_batch_size": 16,
    "per_device_eval_batch_size": 32, "lr_scheduler_type": "cosine",
}  # fmt: skip

Numbers = tuple[int, int]


def numbers() -> list[Numbers]:
    """Every two different numbers of two digits once, each as it will be asked; always the same order."""
    source = random.Random(7)
    drawn = [tuple(source.sample(both, 2)) for both in itertools.combinations(range(10, 100), 2)]
    return source.sample(drawn, len(drawn))  # type: ignore[arg-type]


def question(both: Numbers) -> str:
    return f"{both[0]},{both[1]}"


def either(asked: Iterable[Numbers], seed: int) -> list[object]:
    """Chats whose answer is one of the two numbers, whichever."""
    source = random.Random(seed)
    return [
        {"messages": [{"role": "user", "content": question(both)},
                      {"role": "assistant", "content": str(source.choice(both))}]}
        for both in asked
    ]  # fmt: skip


def larger(asked: Iterable[Numbers]) -> list[object]:
    """Pairs in which the larger number is the better answer."""
    return [{"prompt": question(both), "chosen": str(max(both)), "rejected": str(min(both))} for both in asked]


@pytest.fixture
def place(slurm: LoopbackSlurm, tmp_path: Path) -> Scene:
    """Chats and pairs of the same numbers, pairs of numbers that no record has, a model that knows nothing."""
    scene = Scene(tmp_path / "larger", slurm)
    held_out, learned = numbers()[:HELD_OUT], numbers()[HELD_OUT:]
    tiny.write_records(scene.folder / "either.jsonl", either(learned * 3, seed=1))
    tiny.write_records(scene.folder / "larger.jsonl", larger(learned))
    tiny.write_records(scene.folder / "held-out.jsonl", larger(held_out))
    scene.model(["user", "assistant"] * 100, vocabulary=300, hidden=64, layers=2)
    configuration = scene.folder / "model" / "config.json"
    # From the usual 0.02 a model this narrow learns several times slower.
    shape = json.loads(configuration.read_text("utf-8")) | {"initializer_range": 0.1, "tie_word_embeddings": True}
    configuration.write_text(json.dumps(shape), encoding="utf-8")
    scene.keys |= COMMON
    return scene


def share_of_larger(scene: Scene, name: str) -> float:
    """Export a run and ask transformers: of how many held-out pairs the larger number is the likelier answer."""
    scene.hpcft("export", name, "--output", f"{name}-exported")
    model, tokenizer = answers.load(scene.folder / f"{name}-exported")
    asked = numbers()[:HELD_OUT]
    good, bad = (likelihoods(model, tokenizer, asked, of) for of in (max, min))
    return float((good > bad).float().mean())


def likelihoods(model: Any, tokenizer: Any, asked: list[Numbers], of: Callable[[Numbers], int]) -> torch.Tensor:
    """How likely each conversation is; every digit is a token, so that all are equally long."""
    chats = [
        [{"role": "user", "content": question(both)}, {"role": "assistant", "content": str(of(both))}] for both in asked
    ]
    tokens = torch.tensor(tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"])
    with torch.no_grad():
        scores: torch.Tensor = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, tokens[:, 1:, None]).sum((1, 2))


@pytest.mark.slow
@pytest.mark.campaign
def test_dpo_teaches_what_the_pairs_prefer_and_it_holds_for_pairs_never_seen(place: Scene) -> None:
    began = time.monotonic()
    place.submit("sft", dataset="either.jsonl", max_steps=200, learning_rate=4e-3, eval_steps=-1)
    assert place.wait_for_end("sft") == "finished"
    before = share_of_larger(place, "sft")
    pairs = {"dataset": "larger.jsonl", "val_dataset": "held-out.jsonl"}
    keys = {"model": "./sft-exported", "from_scratch": False, "max_steps": 100, "learning_rate": 1e-3, "eval_steps": 20}
    place.submit("dpo", task="dpo", **pairs, **keys)
    assert place.wait_for_end("dpo") == "finished"
    after = share_of_larger(place, "dpo")

    held_out = [row["eval_rewards/accuracies"] for row in place.metrics("dpo") if "eval_loss" in row]
    print(f"the larger number is the likelier one of {before:.1%} → {after:.1%} of {HELD_OUT} pairs never seen; "
          f"reward accuracies {held_out}; {time.monotonic() - began:.0f} s")  # fmt: skip
    assert 0.4 < before < 0.6
    assert held_out[-1] >= 0.95
    assert after >= 0.95
