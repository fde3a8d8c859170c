"""The command line's share of a run: ``--key value``, ``--key=value``, ``section.key=value``, ``--list a b c``."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.config.leaves import sections
from hpcft.config.source import COMMAND_LINE, Given, spoken
from hpcft.errors import Problem

_ASSIGNMENT = re.compile(r"^[A-Za-z_][\w.-]*=", re.DOTALL)
_SECTION = re.compile(rf"^({'|'.join(name for name in sections() if name)})\.(?=\w)")


@dataclass(frozen=True)
class Words:
    """files: words that belong to no key (the run's YAML); leaves: key in the person's spelling → value."""

    files: tuple[str, ...]
    leaves: Mapping[str, Given]


def read_words(words: Sequence[str], lists: frozenset[str], problems: list[Problem]) -> Words:
    """Sort the words of a command line. ``lists``: the names that take several values, in every spelling.

    A ``--key`` without a value is true. Word order does not matter, except that a list takes the words after it, up to
    a word that ends in .yaml: that one is the run's file, as is the one behind ``--config``.
    """
    files: list[str] = []
    leaves: dict[str, Given] = {}
    for key, value in _pairs(list(words), lists):
        name = _bare(key or "")
        if key is None:
            problem = _loose(value, after_keys=bool(leaves))
            problems += [problem] if problem else []
            files += [] if problem else [value]
        elif name == "config":
            files.append("" if value is True else value)
        elif name in leaves:
            several = f"several values go behind one --{name}" if name in lists else "remove one of them"
            problems.append(Problem(f"{key}: given twice", COMMAND_LINE, spoken(value), hint=several))
        else:
            leaves[name] = Given(value, COMMAND_LINE, key)
    return Words(tuple(files), leaves)


def _pairs(rest: list[str], lists: frozenset[str]) -> Iterator[tuple[str | None, Any]]:
    """Key and value, one after the other; a word that belongs to no key comes with None."""
    while rest:
        word = rest.pop(0)
        dashed = word.startswith("--") and len(word) > 2
        key, equals, value = word.removeprefix("--").partition("=")
        listed = _bare(key) in lists
        if dashed and not equals:
            values: list[str] = []
            while rest and (listed or not values) and not _ends_values(rest[0], _bare(key), listed):
                values.append(rest.pop(0))
            yield key, [part for v in values for part in _split(v)] if listed else values[0] if values else True
        elif dashed or _ASSIGNMENT.match(word):
            yield key, _split(value) if listed else value
        else:
            yield None, word


def _loose(word: str, after_keys: bool) -> Problem | None:
    """What is wrong with a word that belongs to no key; None: it is the run's file."""
    if word.startswith("-"):
        return Problem(f"{word}: no such option", COMMAND_LINE, hint="keys begin with two dashes: --learning_rate 1e-4")
    if word.startswith("="):
        hint = "no blanks around the =: learning_rate=1e-4, or --learning_rate 1e-4"
        return Problem(f"{word}: no key stands before the =", COMMAND_LINE, hint=hint)
    if after_keys and not _is_run_file(word):
        hint = "only keys such as dataset take several values; a value with blanks in it needs quotes"
        return Problem(f"{word}: belongs to no key", COMMAND_LINE, hint=hint)
    return None


def _bare(key: str) -> str:
    return _SECTION.sub("", key).replace("-", "_")


def _ends_values(word: str, key: str, listed: bool) -> bool:
    """A list ends at the next ``--key``, ``key=value`` or run file; a single value may look like ``a=b`` or ``-1``."""
    if word.startswith("--") or (listed and (word.startswith(("-", "=")) or _ASSIGNMENT.match(word))):
        return True
    return _is_run_file(word) and key not in ("cluster", "config")


def _is_run_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _split(value: str) -> list[Any]:
    """``a,b`` is two values; a JSON list or map is what it says."""
    text = value.strip()
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(text)
            return [item if isinstance(item, dict) else str(item) for item in (said if text[0] == "[" else [said])]
    return [part.strip() for part in text.split(",") if part.strip()]
