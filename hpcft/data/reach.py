"""Texts as tokens, and which tokens stand for a stretch of characters, without the list of all offsets.

That list takes a third of the time of tokenising. Two ways do without:

1. *Measured*: with byte-level BPE, as GPT-2, Qwen and many since have it, every token has a length in bytes and the
   tokens of a text are the text, so their sums say where each begins. Whether they are is looked at text by text.
   Such a text is in NFC already, so the normaliser, which would write it anew letter by letter, is left out.
2. *Asked*: any other text is encoded with offsets, and only the tokens at both ends of a stretch are asked for theirs.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
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
    """The tokens of one text. ends: of each token, the bytes up to its end, with ``before`` that are not the text's."""

    def __init__(self, text: str, ids: NDArray[np.int32], ends: NDArray[np.int64], before: int = 0) -> None:
        self.text, self.ids, self.ends, self.before = text, ids, ends, before

    def reach(self, start: int, end: int) -> tuple[int, int]:
        """As ``Asked.reach``."""
        if not self.text.isascii():
            start, end = (len(self.text[:at].encode()) for at in (start, end))
        start, end = start + self.before, end + self.before
        first, past = self.ends.searchsorted((start, end), "right").tolist()
        # The token that ends past ``end`` is in if it begins before it.
        past += past < len(self.ends) and bool((self.ends[past - 1] if past else self.before) < end)
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
        self.plain = _plain(self.backend) if self.bytes is not None else self.backend
        self.doubted = DOUBTED

    def __call__(self, texts: Sequence[str], special: bool) -> list[Tokens]:
        """The tokens of each text. special: with what the tokenizer adds around a text."""
        if not self.direct:
            batch = self.tokenizer(list(texts), add_special_tokens=special).encodings
            return [Asked(one, len(text)) for one, text in zip(batch, texts, strict=True)]
        if self.bytes is None or special:
            return self._asked(texts, special)
        normal = [text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts]
        measured = self._measured([text for text, is_normal in zip(texts, normal, strict=True) if is_normal])
        asked = iter(self._asked([text for text, is_normal in zip(texts, normal, strict=True) if not is_normal]))
        return [next(measured if is_normal else asked) for is_normal in normal]

    def _asked(self, texts: Sequence[str], special: bool = False) -> list[Tokens]:
        batch = self.backend.encode_batch(list(texts), add_special_tokens=special)
        return [Asked(one, len(text)) for one, text in zip(batch, texts, strict=True)]

    def _measured(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """The tokens of texts that are in NFC, one sum over all of them; those that are not their text are asked."""
        assert self.bytes is not None
        lists = [one.ids for one in self.plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        places = [0, *accumulate(map(len, lists))]
        ids = np.fromiter(chain.from_iterable(lists), np.int32, places[-1])
        ends = np.cumsum(self.bytes[ids])
        before = 0
        for text, first, past in zip(texts, places, places[1:], strict=False):
            bytes_ = (int(ends[past - 1]) if past > first else before) - before
            whole = past > first and bytes_ == len(text if text.isascii() else text.encode())
            found = Measured(text, ids[first:past], ends[first:past], before)
            sure = whole and self.doubted <= 0 and self.bytes is not None
            yield found if sure else self._compared(found, whole)
            before += bytes_

    def _compared(self, found: Measured, whole: bool) -> Tokens:
        """The tokens by asking. whole: the measured ones are the text, so they must be the same, cut alike."""
        (asked,) = self._asked([found.text])
        if whole:
            self.doubted -= 1
            if asked.ids.tolist() != found.ids.tolist() or not _alike(asked, found):
                self.bytes = None
        return asked


def _alike(asked: Tokens, measured: Measured) -> bool:
    """Whether both cut the text alike, looked at in up to 128 places."""
    count = len(measured.text)
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


def _plain(backend: Any) -> Any:
    """``backend`` less its normaliser, with the same model; itself where that would know added tokens otherwise."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    plain.pre_tokenizer = backend.pre_tokenizer
    plain.encode_special_tokens = backend.encode_special_tokens
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (plain.add_special_tokens if token.special else plain.add_tokens)([token])
    normal = all(unicodedata.is_normalized("NFC", token.content) for token in added.values())
    return plain if normal and plain.get_added_tokens_decoder() == added else backend


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
