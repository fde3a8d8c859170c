"""Layers of words, the files' and the command line's, become one: ours in name and value, each with its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.config.aliases import ALIASES, NEEDS, SHARDING, denied, rename, says_nothing, switch
from hpcft.config.declined import REFUSED, SET_ASIDE
from hpcft.config.leaves import leaf_sections
from hpcft.config.source import Given, spoken
from hpcft.config.unknown import meant, unknown
from hpcft.errors import Problem, Refusal


@dataclass
class Merged:
    """leaves: ours; notes: words without effect; unread: leaves that were said and could not be understood."""

    leaves: dict[str, Given] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Said:
    """A leaf as we understand it, and its value as it was given."""

    given: Given
    value: Any


def merge(layers: Sequence[Mapping[str, Given]], problems: list[Problem]) -> Merged:
    """Later layers win; what is refused or unknown becomes a problem, what is set aside a note."""
    merged = Merged()
    idle: dict[str, str] = {}
    for layer in layers:
        own: dict[str, _Said] = {}
        for word, given in layer.items():
            try:
                ours = rename(word, given.value)
            except Refusal as refusal:
                problems += [dataclasses.replace(p, where=given.origin) for p in refusal.problems]
                merged.unread |= {leaf for leaf in (ALIASES.get(word, word),) if leaf in leaf_sections()}
                continue
            for leaf, value in ours:
                _add(own, leaf, _Said(Given(value, given.origin, given.word), given.value), problems, merged)
            if word in NEEDS and given.value is not None:
                idle[given.word] = NEEDS[word]
        _deny(layer, own, problems, merged)
        merged.leaves |= {leaf: said.given for leaf, said in own.items()}
    merged.notes += [f"{word} has no effect here: {leaf} is not given" for word, leaf in idle.items()
                     if leaf not in merged.leaves or merged.leaves[leaf].value is None]  # fmt: skip
    return merged


def _add(own: dict[str, _Said], leaf: str, said: _Said, problems: list[Problem], merged: Merged) -> None:
    """One leaf into a layer's own."""
    given = said.given
    if leaf in SET_ASIDE:
        merged.notes += [f"{given.word} has no effect here: {SET_ASIDE[leaf]}"] if said.value is not None else []
    elif leaf in REFUSED:
        if not says_nothing(leaf, said.value):
            what = f"{given.word}: not in this release"
            problems.append(Problem(what, given.origin, spoken(said.value), hint=REFUSED[leaf]))
    elif leaf not in leaf_sections() and leaf not in SHARDING and said.value is None:
        merged.notes.append(f"{given.word} is no key, and nothing stands behind it")
    elif leaf not in leaf_sections() and leaf not in SHARDING:
        problems.append(unknown(dataclasses.replace(given, value=said.value), leaf))
        merged.unread |= set(meant(leaf))
    elif leaf not in own or own[leaf].value is None:
        own[leaf] = said
    elif said.value is not None:
        _again(own[leaf], leaf, said, problems, merged)


def _again(first: _Said, leaf: str, said: _Said, problems: list[Problem], merged: Merged) -> None:
    """A leaf that two words of a layer say."""
    if not _same(first.given.value, said.given.value):
        problems.append(_contradiction(said.given, said.value, first))
    elif _names(said.given.word, leaf) and _names(first.given.word, leaf):
        merged.notes.append(f"{said.given.word} says the same as {first.given.word} at {first.given.origin}")


def _deny(layer: Mapping[str, Given], own: dict[str, _Said], problems: list[Problem], merged: Merged) -> None:
    """Switches that are off take back what an earlier layer said, and contradict what their own one says."""
    for word, given in layer.items():
        leaf, value = denied(word, given.value) or ("", None)
        if leaf in own and own[leaf].given.value == value:
            problems.append(_contradiction(given, given.value, own[leaf]))
        elif leaf in merged.leaves and merged.leaves[leaf].value == value:
            del merged.leaves[leaf]


def _contradiction(given: Given, value: Any, first: _Said) -> Problem:
    other = f"{first.given.word}: {spoken(first.value)} at {first.given.origin}"
    return Problem(f"{given.word}: contradicts {other}", given.origin, spoken(value), hint="remove one of them")


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one, in whatever spelling: ``yes`` and ``true``, 1e-4 and ``0.0001``."""
    return bool(one == other or _spelt(one) == _spelt(other))


def _spelt(value: Any) -> Any:
    try:
        return float(switch(value))
    except (TypeError, ValueError, OverflowError):
        return spoken(value).lower()


def _names(word: str, leaf: str) -> bool:
    """Whether a key is a name of the leaf; other words may say the same beside it: ``load_in_4bit`` and ``qlora``."""
    bare = word.rpartition(".")[2].replace("-", "_")
    return ALIASES.get(bare, bare) == leaf
