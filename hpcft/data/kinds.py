"""What a row is to an objective, and what a document is to a batch."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """Of a document, as the column ``kinds`` holds it. A chosen one is always followed by its rejected one."""

    CHAT = 0
    CHOSEN = 1
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4
    LABELLED = 5

    @property
    def word(self) -> str:
        return self.name.lower()
