"""Where two Plans differ, key by key, and a Plan's text with other values for some of its keys.

A key is dotted, ``optim.learning_rate``; a list is one value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hpcft.plan.plan import Plan


def differing(new: Plan, old: Plan) -> list[str]:
    """The keys in which two plans differ, in the order of the Plan."""
    return differing_keys(dataclasses.asdict(new), dataclasses.asdict(old))


def differing_keys(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The same of two plans as dictionaries."""
    return list(_differing(new, old, ""))


def _differing(new: Any, old: Any, key: str) -> Iterator[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        for name in new | old:
            if new.get(name) != old.get(name):
                yield from _differing(new.get(name), old.get(name), f"{key}.{name}" if key else name)
    elif new != old:
        yield key


def value(data: Mapping[str, Any], key: str) -> Any:
    """What a plan, as a dictionary, has under ``key``. Raises KeyError."""
    for name in key.split("."):
        data = data[name]
    return data


def text_with(text: str, values: Mapping[str, Any]) -> str:
    """A Plan's canonical text with these values for these keys.

    Of whatever schema it is: the text is not read as a Plan. Raises KeyError for a key that is not there.
    """
    data = json.loads(text)
    for key, new in values.items():
        *sections, leaf = key.split(".")
        section = value(data, ".".join(sections)) if sections else data
        section[leaf]  # a key of another release is an error, not a new key
        section[leaf] = new
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def fingerprint_of(text: str) -> str:
    """``Plan.fingerprint`` of a Plan's canonical text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
