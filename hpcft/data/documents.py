"""What a row becomes: a document, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hpcft.data.kinds import Kind

KEPT, TOO_LONG, UNTRAINED = "kept", "too long", "untrained"


@dataclass
class Document:
    """What one row became. tokens: int32 [n]; trained: bool [n]; both empty unless fate is ``kept``.

    length: tokens before truncation, of a pair that is not kept both answers' together. why: the reason of any other
    fate. ends: token id → turns it closed. rejected: of a pair, whose good answer this is, the bad one.
    """

    fate: str
    length: int
    why: str = ""
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    ends: Counter[int] = field(default_factory=Counter)
    kind: Kind = Kind.CHAT
    margin: float = 0.0
    truncated: bool = False
    end_added: bool = False
    control: bool = False  # a special token is written out in the row's own words
    rejected: Document | None = None

    @property
    def both(self) -> tuple[Document, ...]:
        """What is stored of the row, in order: of a pair the chosen one and the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)
