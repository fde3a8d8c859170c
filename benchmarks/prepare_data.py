"""Made records and a tokenizer of a real size for ``benchmarks.prepare``: the same bytes on every machine.

Words are made of syllables and drawn as a language draws them (Zipf), with numbers, code, accents and other scripts
among them; lengths of conversations are log-normal, so that a few are a hundred times as long as most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS = 60_000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BLOCK = 4096  # records drawn at a time


def vocabulary() -> list[str]:
    """Words, the frequent ones first and short, with what else stands in text."""
    draw = np.random.default_rng(1)
    onsets = ["", "b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pr", "sh"]
    rhymes = ["a", "e", "i", "o", "u", "er", "in", "on", "an", "al", "ing", "ent", "ous", "é", "ü"]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        syllables = 1 + min(4, len(words) * 5 // WORDS) + int(draw.integers(0, 2))
        words["".join(str(draw.choice(onsets)) + str(draw.choice(rhymes)) for _ in range(syllables))] = None
    made = list(words)
    others = [
        ".",
        ",",
        ".\n\n",
        "?",
        "2024",
        "3.14",
        "\n- ",
        "def f(x):\n    return x + 1\n",
        "数据",
        "的模型",
        "данные",
    ]
    for n, other in enumerate(others):
        made.insert(3 + 7 * n, other)
    return made


def records(count: int) -> Iterator[str]:
    """``count`` lines of JSON, ``messages`` of one to three exchanges, about a kilobyte in the mean."""
    words, draw = np.array(vocabulary(), object), np.random.default_rng(2)
    odds = 1.0 / np.arange(3, len(words) + 3)
    edges = np.cumsum(odds / odds.sum())
    for start in range(0, count, BLOCK):
        many = min(BLOCK, count - start)
        turns = 2 * draw.choice([1, 1, 1, 2, 3], many)
        lengths = 2 + draw.lognormal(3.25, 0.95, int(turns.sum())).astype(int)
        stream = words[np.searchsorted(edges, draw.random(int(lengths.sum()))).clip(0, len(words) - 1)].tolist()
        text = iter(np.split(np.arange(len(stream)), np.cumsum(lengths)[:-1]))
        for n in turns.tolist():
            spoken = (next(text) for _ in range(n))
            chat = [
                {"role": ("user", "assistant")[at % 2], "content": " ".join(stream[said[0] : said[-1] + 1])}
                for at, said in enumerate(spoken)
            ]
            yield json.dumps({"messages": chat}, ensure_ascii=False) + "\n"


def write_records(path: Path, count: int) -> Path:
    """The records as one JSON Lines file, unless it is there."""
    if not path.is_file():
        with path.with_suffix(".part").open("w", encoding="utf-8") as file:
            file.writelines(records(count))
        path.with_suffix(".part").rename(path)
    return path


def write_tokenizer(folder: Path, template: str, size: int = 32_000) -> Path:
    """A byte-level BPE of ``size`` tokens, split as Qwen's is, trained on records; with this chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return folder
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    said = (turn["content"] for line in records(20_000) for turn in json.loads(line)["messages"])
    bpe.train_from_iterator(said, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
