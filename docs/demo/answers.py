"""Asking a model of transformers many questions at once, and counting the answers that are right to the letter.

Nothing here knows hpcft: the folder is any that ``from_pretrained`` takes. By itself it answers from the command line:

    python docs/demo/answers.py .demo/trained "sort blacksmith"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONGEST_ANSWER = 16  # tokens


def load(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of an exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the weights of a model this size are there at once
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def newborn(folder: Path, seed: int) -> tuple[Any, Any]:
    """A model with random weights in the shape of ``folder``'s config.json, and the tokenizer there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The likeliest answer to each question: one batch, padded on the left, greedy."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(
        **batch,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def exact_match(given: Sequence[str], right: Sequence[str]) -> float:
    """The share of answers that are right to the letter."""
    return sum(g == r for g, r in zip(given, right, strict=True)) / len(right)


def main() -> None:
    """Answer the questions of the command line."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} FOLDER QUESTION …")
    model, tokenizer = load(Path(sys.argv[1]))
    for question, answer in zip(sys.argv[2:], answers(model, tokenizer, sys.argv[2:]), strict=True):
        print(f"{question} → {answer}")


if __name__ == "__main__":
    main()
