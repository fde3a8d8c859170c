"""A model folder without weights: the shape of a very small Qwen2, and a tokenizer that knows letters and two words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

END, ROLES = "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
WORDS = ("sort", "backwards")  # one token each; everything else is spelt byte by byte

# A turn is its role's token, its words, and the token that ends it. Nothing stands between turns.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- endif -%}
"""

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    # From the usual 0.02 a model this narrow learns several times slower.
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}


def write(folder: Path) -> None:
    """config.json and the tokenizer's files: all that ``from_scratch: true`` needs."""
    speaker = tokenizer()
    speaker.save_pretrained(folder)
    ends = {"eos_token_id": speaker.eos_token_id, "pad_token_id": speaker.pad_token_id}
    shape = {**SHAPE, "vocab_size": len(speaker), "bos_token_id": None, **ends}
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")


def tokenizer() -> Any:
    """A fast tokenizer of transformers: 256 bytes, the words, the tokens of the template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    core.add_special_tokens([AddedToken(text, normalized=False) for text in (END, *ROLES)])
    speaker = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    speaker.chat_template = CHAT_TEMPLATE
    return speaker
