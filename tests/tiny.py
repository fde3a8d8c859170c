"""A tiny Qwen2-shaped model with a tokenizer trained on its records: what tests and `templates/runs/tiny.yaml` run on.

python -m tests.tiny FOLDER    writes FOLDER/tiny-model and FOLDER/tiny.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "north",
    "south",
    "east",
    "west",
    "old",
    "new",
    "small",
    "large",
    "river",
    "stone",
    "tree",
    "road",
]


def records(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Chats whose answer follows from the question: the words of the question in reverse."""
    source = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        words = source.choices(WORDS, k=source.randint(2, 9))
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": " ".join(words)},
                    {"role": "assistant", "content": " ".join(reversed(words))},
                ]
            }
        )
    return rows


def write_records(path: Path, rows: Iterable[object]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(
    folder: Path, texts: Iterable[str], *, vocabulary: int = 512, hidden: int = 64, layers: int = 2
) -> Path:
    """A model folder without weights: configuration and a byte-level tokenizer trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    Qwen2Config(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)
    return folder


def main() -> None:
    """Write the model and the records of ``templates/runs/tiny.yaml`` into the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = records(600)
    write_records(folder / "tiny.jsonl", rows)
    write_model(folder / "tiny-model", (json.dumps(row) for row in rows))
    print(f"wrote {folder / 'tiny.jsonl'} and {folder / 'tiny-model'}")


if __name__ == "__main__":
    main()
