"""The command line's share of a run: ``--key value``, ``--key=value``, ``section.key=value``, ``--list a b c``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.config.source import COMMAND_LINE, Given
from hpcft.errors import Problem

_ASSIGNMENT = re.compile(r"^[A-Za-z_][\w.-]*=", re.DOTALL)
_SECTION = re.compile(r"^(model|data|tuner|train|parallel|checkpoint|slurm)\.(?=\w)")


@dataclass(frozen=True)
class Words:
    """files: words that belong to no key (the run's YAML); leaves: key in the person's spelling → value."""

    files: tuple[str, ...]
    leaves: Mapping[str, Given]


def read_words(words: Sequence[str], lists: frozenset[str], problems: list[Problem]) -> Words:
    """Sort the words of a command line. ``lists``: the names that take several values, in every spelling.

    A ``--key`` without a value is true. Word order does not matter, except that a list takes the words after it.
    """
    files: list[str] = []
    leaves: dict[str, Given] = {}

    def give(word: str, value: Any) -> None:
        name = _SECTION.sub("", word).replace("-", "_")
        if name in leaves:
            problems.append(Problem(f"{word}: given twice", COMMAND_LINE, hint="remove one of them"))
        leaves[name] = Given(value, COMMAND_LINE, word)

    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            if equals:
                give(key, _split(value) if _bare(key) in lists else value)
                continue
            take = len(rest) if _bare(key) in lists else 1
            values: list[str] = []
            while rest and len(values) < take and not _is_key(rest[0], listed=take > 1):
                values.append(rest.pop(0))
            if _bare(key) in lists:
                give(key, [part for value in values for part in _split(value)])
            else:
                give(key, values[0] if values else True)
        elif _ASSIGNMENT.match(word):
            key, _, value = word.partition("=")
            give(key, _split(value) if _bare(key) in lists else value)
        else:
            files.append(word)
    return Words(tuple(files), leaves)


def _bare(key: str) -> str:
    return _SECTION.sub("", key).replace("-", "_")


def _is_key(word: str, listed: bool) -> bool:
    """A list ends at the next ``--key`` or ``key=value``; a single value may look like ``a=b``."""
    return word.startswith("--") or (listed and bool(_ASSIGNMENT.match(word)))


def _split(value: str) -> list[str]:
    """``a,b`` is two values; a JSON list is what it says."""
    text = value.strip()
    if text.startswith("["):
        import json

        try:
            return [str(item) for item in json.loads(text)]
        except ValueError:
            pass
    return [part.strip() for part in text.split(",") if part.strip()]
