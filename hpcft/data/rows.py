"""The canonical row: one training record, whatever shape it came in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_canonical = json.JSONEncoder(sort_keys=True, default=str).encode

Category = str | int
"""What a label says: the name of a class, or its number."""

Message = dict[str, Any]
"""One turn: ``role``, ``content``, optionally ``loss`` (bool) and whatever else a chat template may read."""


@dataclass(frozen=True)
class Row:
    """One training record. Either ``messages`` (with ``tools`` they may call) or raw ``text``.

    rejected: of a pair, the bad conversation, whole; ``messages`` is the good one. label: of a rated row, whether its
    answer is a good one. margin: by how much the good answer of a pair is better, where the record says so. category:
    of a labelled row, its class.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] | None = None
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    margin: float | None = None
    category: Category | None = None

    @property
    def digest(self) -> int:
        """64 bits of BLAKE2 over the canonical content: equal rows have equal digests whatever shape they came in.

        The margin is no part of it: the same two answers are the same pair.
        """
        labelled = [] if self.category is None else [self.category]
        return _digest([self.messages, self.tools, self.text, self.rejected, self.label, *labelled])

    @property
    def group(self) -> int:
        """What rows have in common that must not stand on both sides of a validation split.

        Of pairs and rated rows the prompt, for a model that knows one answer's worth knows another's; of labelled rows
        all but the label; else the digest.
        """
        if self.category is not None:
            return dataclasses.replace(self, category=None).digest
        if self.rejected:
            return _digest([_said(turn) for turn in self.messages[: self.shared]])
        if self.label is not None:
            return _digest([_said(turn) for turn in self.messages[: self.answered]])
        return self.digest

    @property
    def answered(self) -> int:
        """How many turns there are up to the user's last words."""
        return max((n + 1 for n, turn in enumerate(self.messages) if turn["role"] == "user"), default=0)

    @property
    def shared(self) -> int:
        """Of a pair: how many turns its two conversations have in common before they part."""
        both = list(zip(self.messages, self.rejected, strict=False))
        return next((n for n, (good, bad) in enumerate(both) if _said(good) != _said(bad)), len(both))


def opened(row: Row, system: str) -> Row:
    """``row`` beginning with the system turn ``system``, unless it is raw text or has a system turn already."""

    def begun(turns: tuple[Message, ...]) -> tuple[Message, ...]:
        if not turns or turns[0]["role"] in ("system", "developer"):
            return turns
        return ({"role": "system", "content": system}, *turns)

    return dataclasses.replace(row, messages=begun(row.messages), rejected=begun(row.rejected))


def undeveloped(row: Row) -> Row:
    """``row`` with its developer's turns, as newer models call them, as the system's."""
    if not any(turn["role"] == "developer" for turn in (*row.messages, *row.rejected)):
        return row
    messages, rejected = (
        tuple({**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns)
        for turns in (row.messages, row.rejected)
    )
    return dataclasses.replace(row, messages=messages, rejected=rejected)


def filled(row: Row, names: Mapping[str, str]) -> Row:
    """``row`` with every placeholder of ``names`` ({{NAME}}, {{AUTHOR}}) replaced in its texts."""

    def fill(text: str) -> str:
        for placeholder, name in names.items():
            text = text.replace(placeholder, name)
        return text

    messages, rejected = (
        tuple({**turn, "content": fill(turn["content"])} for turn in turns) for turns in (row.messages, row.rejected)
    )
    text = None if row.text is None else fill(row.text)
    return dataclasses.replace(row, messages=messages, rejected=rejected, text=text)


def _digest(content: Any) -> int:
    text = _canonical(content).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _said(turn: Message) -> Message:
    return {key: value for key, value in turn.items() if key != "loss"}
