"""Texts as tokens, and which tokens stand for a stretch of characters, without the list of all offsets.

That list takes a third of the time of tokenising. Two ways do without:

1. *Measured*: with byte-level BPE, as GPT-2, Qwen and many since have it, every token has a length in bytes and the
   tokens of a text are the text, so their sums say where each begins. Whether they are is looked at text by text.
2. *Asked*: any other text is encoded with offsets, and only the tokens at both ends of a stretch are asked for theirs.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOUBTED = 64  # texts of each process that are encoded both ways and compared


class Asked:
    """The tokens of one text. encoding: a ``tokenizers.Encoding``; characters: how many the text has."""

    def __init__(self, encoding: Any, characters: int) -> None:
        self.encoding, self.characters = encoding, characters

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        return np.array(self.encoding.ids, np.int32)

    def reach(self, start: int, end: int) -> tuple[int, int]:
        """The tokens (first, past the last) with at least one of the characters ``start`` … ``end``.

        A token that holds the template's last character and the assistant's first one is in, for the model has to
        learn that word. Tokens may lack characters (trimmed spaces) and share one (pieces of an emoji), so both ends
        are looked at token by token; their offsets never go back.
        """
        count, characters = len(self.ids), self.encoding.token_to_chars
        past = self._at(end, self.characters, count)
        while past < count and characters(past)[0] < end:
            past += 1
        while past and characters(past - 1)[0] >= end:
            past -= 1
        first = min(past, self._at(start, end, past))
        while first < past and characters(first)[1] <= start:
            first += 1
        while first and characters(first - 1)[1] > start:
            first -= 1
        return first, past

    def _at(self, start: int, end: int, otherwise: int) -> int:
        """The first token that holds the first character from ``start`` on that any token holds, before ``end``."""
        found = (self.encoding.char_to_token(at) for at in range(start, end))
        return next((token for token in found if token is not None), otherwise)


class Measured:
    """The tokens of one text. ends: of each token, the bytes of the text up to its end."""

    def __init__(self, text: str, ids: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.text, self.ids, self.ends = text, ids, ends

    def reach(self, start: int, end: int) -> tuple[int, int]:
        """As ``Asked.reach``."""
        if not self.text.isascii():
            start, end = (len(self.text[:at].encode()) for at in (start, end))
        first, past = (int(n) for n in np.searchsorted(self.ends, (start, end), "right"))
        # The token that ends past ``end`` is in if it begins before it.
        past += past < len(self.ends) and (self.ends[past - 1] if past else 0) < end
        return min(first, past), past


Tokens = Asked | Measured


class Encodings:
    """Texts → ``Tokens``; the same ids as ``tokenizer(texts)``, less the lists that it makes for models."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerFast as Fast

        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        tokenizer("", add_special_tokens=False)  # leaves the backend without truncation and padding
        names = ("__call__", "_encode_plus")  # where a subclass has its own, its own code must run
        self.direct = all(getattr(type(tokenizer), name, None) is getattr(Fast, name, None) for name in names)
        self.bytes = lengths(self.backend) if self.direct else None
        self.doubted = DOUBTED

    def __call__(self, texts: Sequence[str], special: bool) -> list[Tokens]:
        """The tokens of each text. special: with what the tokenizer adds around a text."""
        if not self.direct:
            batch = self.tokenizer(list(texts), add_special_tokens=special).encodings
            return [Asked(one, len(text)) for one, text in zip(batch, texts, strict=True)]
        if self.bytes is None or special:
            batch = self.backend.encode_batch(list(texts), add_special_tokens=special)
            return [Asked(one, len(text)) for one, text in zip(batch, texts, strict=True)]
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._measured(text, np.array(one.ids, np.int32)) for text, one in zip(texts, batch, strict=True)]

    def _measured(self, text: str, ids: NDArray[np.int32]) -> Tokens:
        assert self.bytes is not None
        ends = np.cumsum(self.bytes[ids])
        size = len(text) if text.isascii() else len(text.encode())
        whole = len(ids) and ends[-1] == size and (text.isascii() or unicodedata.is_normalized("NFC", text))
        if whole and self.doubted <= 0:
            return Measured(text, ids, ends)
        asked = Asked(self.backend.encode(text, add_special_tokens=False), len(text))
        if whole:
            self.doubted -= 1
            if asked.ids.tolist() != ids.tolist() or not _alike(asked, Measured(text, ids, ends)):
                self.bytes = None
        return asked


def _alike(asked: Asked, measured: Measured) -> bool:
    """Whether both cut the text alike, looked at in up to 128 places."""
    count = asked.characters
    places = range(0, count, 1 + count // 128)
    return all(asked.reach(at, count) == measured.reach(at, count) for at in places)


def lengths(backend: Any) -> NDArray[np.int64] | None:
    """Of each token of a byte-level BPE its bytes; None where tokens are anything but the text cut into pieces."""
    model = backend.model
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if type(model).__name__ != "BPE" or any(getattr(model, name, None) for name in odd):
        return None
    if not (_normal(backend.normalizer) and _splits(_state(backend.pre_tokenizer)) and not _trims(backend)):
        return None
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not alphabet <= vocabulary.keys():
        return None
    added = backend.get_added_tokens_decoder()
    table = np.zeros(1 + max([*vocabulary.values(), *added]), np.int64)
    for token, id_ in vocabulary.items():
        # A token with other letters is in no text, unless it is one of the added ones; 0 makes any such text asked.
        table[id_] = len(token) if alphabet.issuperset(token) else 0
    for id_, token in added.items():
        table[id_] = len(token.content.encode())
    return table


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its JSON; empty where there is none."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _normal(normalizer: Any) -> bool:
    return _state(normalizer).get("type") in (None, "NFC")


def _splits(state: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer ends in bytes and only cuts before: it adds, drops and changes nothing."""
    parts = state.get("pretokenizers", [state] if state else [])
    *before, last = parts or [{}]
    cuts = all(part.get("type") == "Digits" or part.get("behavior") == "Isolated" for part in before)
    return cuts and last.get("type") == "ByteLevel" and not last.get("add_prefix_space")


def _trims(backend: Any) -> bool:
    """Whether spaces at the ends of tokens do not count as theirs."""
    return '"trim_offsets":true' in json.dumps(_state(backend.post_processor), separators=(",", ":"))
