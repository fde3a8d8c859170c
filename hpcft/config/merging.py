"""Layers of words, the files' and the command line's, become one: ours in name and value, each with its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.config.aliases import ALIASES, REFUSED, SET_ASIDE, SHARDING, rename, says_nothing
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


def merge(layers: Sequence[Mapping[str, Given]], problems: list[Problem]) -> Merged:
    """Later layers win; what is refused or unknown becomes a problem, what is set aside a note."""
    merged = Merged()
    for layer in layers:
        own: dict[str, Given] = {}
        for word, given in layer.items():
            try:
                ours = rename(str(word), given.value)
            except Refusal as refusal:
                problems += [dataclasses.replace(p, where=given.origin) for p in refusal.problems]
                merged.unread |= {leaf for leaf in (ALIASES.get(word, word),) if leaf in leaf_sections()}
                continue
            for leaf, value in ours:
                _add(own, leaf, Given(value, given.origin, given.word), given.value, problems, merged)
        merged.leaves |= own
    return merged


def _add(own: dict[str, Given], leaf: str, given: Given, said: Any, problems: list[Problem], merged: Merged) -> None:
    """One leaf into a layer's own. said: the value as it was given."""
    if leaf in SET_ASIDE:
        merged.notes += [f"{given.word} has no effect here: {SET_ASIDE[leaf]}"] if said is not None else []
    elif leaf in REFUSED:
        if not says_nothing(leaf, said):
            problems.append(
                Problem(f"{given.word}: not in this release", given.origin, spoken(said), hint=REFUSED[leaf])
            )
    elif leaf not in leaf_sections() and leaf not in SHARDING:
        problems.append(unknown(dataclasses.replace(given, value=said), leaf))
        merged.unread |= set(meant(leaf))
    elif leaf not in own:
        own[leaf] = given
    elif own[leaf].value != given.value or (_names(given.word, leaf) and _names(own[leaf].word, leaf)):
        what = f"{given.word}: says the same as {own[leaf].word} at {own[leaf].origin}"
        problems.append(Problem(what, given.origin, hint="remove one of them"))


def _names(word: str, leaf: str) -> bool:
    """Whether a key is a name of the leaf; other words may say the same beside it: ``load_in_4bit`` and ``qlora``."""
    bare = word.rpartition(".")[2].replace("-", "_")
    return ALIASES.get(bare, bare) == leaf
