"""Words that nobody knows: what may have been meant by them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from hpcft.config.aliases import ALIASES, SHARDING, SWITCHES
from hpcft.config.declined import REFUSED, SET_ASIDE
from hpcft.config.leaves import leaf_sections, sections
from hpcft.config.run import RunConfig, Section
from hpcft.config.source import Given, spoken
from hpcft.errors import Problem, near


def known(word: str) -> bool:
    """Whether a word, in its bare spelling, has a meaning here, be it that it is refused."""
    return any(word in table for table in (leaf_sections(), ALIASES, SWITCHES, SHARDING, SET_ASIDE, REFUSED))


def section_of(name: str, inside: Mapping[Any, Any]) -> str | None:
    """The section that a key with a map behind it is or was meant to be, "" where it resembles none; None: a leaf."""
    names = [section for section in sections() if section]
    if name in names:
        return name
    if not inside or known(_bare(name)):
        return None
    of_ours = any(known(_bare(str(key))) for key in inside)
    return near(name, names, cutoff=0.6 if of_ours else 0.7) or ("" if of_ours else None)


def _bare(word: str) -> str:
    return word.replace("-", "_")


def meant(leaf: str) -> tuple[str, ...]:
    """Our leaves that an unknown word was meant to set, as far as can be told."""
    if leaf in sections():
        return sections()[leaf]
    ours = ALIASES.get(guess := _guess(leaf), guess)
    return (ours,) if ours in leaf_sections() else ()


def unknown(given: Given, leaf: str) -> Problem:
    """The complaint about a word that is no key."""
    if leaf in sections():
        hint = f"its keys stand under it: {leaf}: {{{_example(leaf, given.value)}}}"
        return Problem(f"{given.word}: is a section, and no key", given.origin, spoken(given.value), hint=hint)
    guess = _guess(leaf)
    own = ALIASES.get(guess, guess)
    section = leaf_sections().get(own, "")
    hint = f"did you mean {guess}?" if guess else "every key is listed by: hpcft init --list"
    if guess in leaf_sections() or guess in ALIASES:
        hint += f" (here: {section + '.' if section else ''}{own})"
    return Problem(f"{given.word}: no such key", given.origin, spoken(given.value), hint=hint)


def _guess(leaf: str) -> str:
    """The word nearest to one that is unknown: in a misspelt section it may itself be right."""
    words = [*leaf_sections(), *ALIASES, *SWITCHES, *SHARDING]
    return near(leaf.rpartition(".")[2], words, cutoff=0.7)


def _example(section: str, value: Any) -> str:
    """The first key of a section, with ``value`` where it can be meant for it."""
    leaf = sections()[section][0]
    model = typing.cast(type[Section], RunConfig.model_fields[section].annotation)
    try:
        model.model_validate({leaf: value})
    except ValidationError:
        return f"{leaf}: …"
    return f"{leaf}: {spoken(value)}"
