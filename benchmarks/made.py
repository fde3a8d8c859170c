"""Data made for a measurement: windows of random tokens over the whole vocabulary, the same for whoever reads them.

Every window is full and holds as many documents as the others, so a contestant that pads each document by itself, and
one that packs, do the same work in an optimizer step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hpcft.data.kinds import Kind
from hpcft.data.shards import Window

MEAN_DOCUMENT = 235  # tokens of a record of instructions, as measured on real ones
SHORTEST = 8  # tokens of a document


class Windows:
    """``number`` windows of ``length`` tokens, each cut into ``documents`` ones; fulfils ``protocols.Windows``.

    pairs: every second document is the rejected answer to the prompt of the one before it, and prompts are not
    trained; else everything is, but for a document's first token.
    """

    def __init__(self, number: int, length: int, vocabulary: int, documents: int = 1, pairs: bool = False) -> None:
        if pairs and documents % 2:
            raise ValueError(f"{documents} documents are no pairs")
        if documents * SHORTEST > length:
            raise ValueError(f"{length} tokens are too few for {documents} documents")
        self.number, self.length, self.vocabulary = number, length, vocabulary
        self.documents, self.pairs = documents, pairs
        self._make = lru_cache(maxsize=None)(self._made)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Window:
        return self._make(range(self.number)[index])

    def trained_tokens(self, index: int) -> int:
        """How many tokens of a window carry loss."""
        return int(self[index].trained.sum())

    def count(self, index: int, kinds: Collection[int]) -> int:
        """How many documents of a window are of one of ``kinds``."""
        return sum(kind in kinds for kind in self[index].kinds)

    def _made(self, index: int) -> Window:
        draw = np.random.default_rng(index)
        lengths = document_lengths(draw, self.length, self.documents)
        tokens = draw.integers(0, self.vocabulary, self.length).astype(np.int32)
        trained = np.ones(self.length, bool)
        starts = np.cumsum([0, *lengths[:-1]])
        trained[starts] = False
        kinds = [int(Kind.CHAT)] * len(lengths)
        if self.pairs:
            kinds = [int(Kind.CHOSEN), int(Kind.REJECTED)] * (len(lengths) // 2)
            for chosen in range(0, len(lengths), 2):
                prompt = prompt_length(lengths, chosen)
                first, second = starts[chosen], starts[chosen + 1]
                tokens[second : second + prompt] = tokens[first : first + prompt]
                trained[first : first + prompt] = trained[second : second + prompt] = False
        return Window(tokens, trained, lengths, kinds, [0.0] * len(lengths))


def document_lengths(draw: np.random.Generator, length: int, documents: int) -> list[int]:
    """``documents`` lengths that sum to ``length``: exponential ones, brought to the same sum, none below SHORTEST."""
    if documents == 1:
        return [length]
    shares = draw.exponential(size=documents)
    lengths = SHORTEST + np.floor(shares / shares.sum() * (length - SHORTEST * documents)).astype(int)
    lengths[int(lengths.argmax())] += length - int(lengths.sum())
    return [int(n) for n in lengths]


def prompt_length(lengths: list[int], chosen: int) -> int:
    """Tokens of the prompt that document ``chosen`` and the one after it share: half of the shorter one."""
    return min(lengths[chosen], lengths[chosen + 1]) // 2


@dataclass
class Prepared:
    """What ``assemble`` wants of prepared data."""

    train: Any
    validation: None = None
    content: str = "made-for-a-measurement"
