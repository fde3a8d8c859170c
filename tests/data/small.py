"""A small tokenizer, chat templates in the manner of known families, and data sets of a few rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hpcft.plan.plan import DataPlan, Source
from tests.plans import plan

# Each file has the trait of its family that makes masking hard, and no more.
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "templates").iterdir()}
EOS = {
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>",
    "thinking": "<|im_end|>", "opened_thought": "<|end|>", "phi": "<|endoftext|>", "endless": "<|endoftext|>",
    "tools": "<|im_end|>", "dated": "<|im_end|>", "shouting": "<|im_end|>",
    "two_ends": "<|im_end|>", "channels": "<|im_end|>", "parts": "<|im_end|>",
}  # fmt: skip
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]
WORDS = (
    "the answer is that two and two are four , and what do you say about it ? Hello there , how can I help you today"
)


def write_tokenizer(
    folder: Path,
    template: str | None = "chatml",
    text: str = "",
    specials: Sequence[str] = SPECIAL,
    eos: str = "",
    bos: str | None = "<|begin_of_text|>",
) -> Path:
    """A folder with a byte-level BPE tokenizer of a few hundred tokens and the chat template of that name, or ``text``.

    specials: its special tokens, eos and bos among them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*specials], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([WORDS] * 8, trainer)
    bpe.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos or EOS.get(template or "", "<|endoftext|>"), bos_token=bos
    )
    tokenizer.chat_template = text or (TEMPLATES[template] if template else None)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """A ``messages`` record of turns by user and assistant in alternation."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **more}


def request(*paths: Path | Source, tokenizer: Path, **changes: Any) -> DataPlan:
    """The DataPlan of these train files, with ``changes``."""
    sources = tuple(path if isinstance(path, Source) else Source(path=str(path)) for path in paths)
    return plan(data={"train": sources, "tokenizer": str(tokenizer), "max_length": 256, **changes}).data
