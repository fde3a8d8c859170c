"""What a row becomes: a document, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from hpcft.data.kinds import Kind
from hpcft.data.rows import Category

KEPT, TOO_LONG, UNTRAINED = "kept", "too long", "untrained"


class Turn(str, Enum):
    """What became of a turn, and why."""

    TRAINED = "trained"
    SILENT = "silent"  # the assistant's, whose loss is false
    EARLIER = "earlier"  # the assistant's, before the only answer that is trained
    EMPTY = "empty"  # the assistant's, who says nothing
    OTHERS = "others"  # of the user, the system, a tool
    UNENDED = "unended"  # of the assistant's trained ones, those that no token closes
    SHORTENED = "shortened"  # of the same, those of which the template leaves a part out, as a rule their thoughts


@dataclass
class Document:
    """What one row became. tokens: int32 [n]; trained: bool [n]; both empty unless fate is ``kept``.

    length: tokens before truncation, of a pair that is not kept both answers' together. why: the reason of any other
    fate. ends: int64, the places of the tokens that close trained turns. turns: how many there are of each kind that
    ``Turn`` names. rejected: of a pair, whose good answer this is, the bad one. pieces: of a text that is split.
    """

    fate: str
    length: int
    why: str = ""
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    ends: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    turns: Counter[str] = field(default_factory=Counter)
    kind: Kind = Kind.CHAT
    margin: float = 0.0  # of a labelled row, the number of its class
    category: Category | None = None
    truncated: bool = False
    end_added: bool = False
    end_cut: bool = False  # truncation took the end of a trained turn away
    control: bool = False  # a special token is written out in the row's own words
    tools_unwritten: bool = False  # the row has tools, the template does not write them
    arguments_text: bool = False  # the arguments of a call are no object, nor the JSON of one
    rejected: Document | None = None
    pieces: tuple[Document, ...] = ()

    @property
    def end_tokens(self) -> list[int]:
        """The token that closes each trained turn, where one does."""
        tokens: list[int] = self.tokens[self.ends].tolist()
        return tokens

    @property
    def end_twice(self) -> bool:
        """Is a turn closed by the same token twice? Then a model learns to go on behind the first of them."""
        tokens, trained = self.tokens, self.trained
        return any(bool(at and trained[at - 1] and tokens[at] == tokens[at - 1]) for at in self.ends.tolist())

    @property
    def split(self) -> bool:
        return bool(self.pieces)

    @property
    def records(self) -> tuple[Document, ...]:
        """What stands in windows each for itself: the pieces of a split text, else this one."""
        return self.pieces or (self,)

    @property
    def both(self) -> tuple[Document, ...]:
        """What is stored of the row, in order: of a pair the chosen one and the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)
