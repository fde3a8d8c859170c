"""The classes of labelled rows: which there are, by which number a model knows each, how often each occurs.

Labels that are all numbers are the classes' own numbers; else they are names, numbered in the order of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcft.data.documents import Document
from hpcft.data.rows import Category
from hpcft.data.shards import Windows
from hpcft.errors import Refusal, refuse

MOST = 4096  # different labels; a file with more has something else under that key
Labels = Mapping[Category, int]  # of a file: each label and the line where it stands first


@dataclass(frozen=True)
class Classes:
    """names: by number. numbers: of each label as the files spell it."""

    names: tuple[str, ...] = ()
    numbers: Mapping[Category, int] | None = None

    def mark(self, document: Document) -> None:
        """Give a labelled row's document its class; others are left as they are."""
        if self.numbers is not None and document.category is not None:
            document.margin = float(self.numbers[document.category])


def found(files: Iterable[tuple[str, Labels]], wanted: int) -> Classes:
    """The classes of all files, (path as shown, labels). wanted: how many a person said there are, 0: nobody did.

    Raises Refusal for numbers beside names, for more classes than wanted, and where all labels are the same.
    """
    first: dict[Category, str] = {}
    for shown, labels in files:
        for label, line in labels.items():
            first.setdefault(label, f"{shown}:{line}")
    if not first:
        return Classes()
    numbers = {label: number(label) for label in first}
    if all(value is not None for value in numbers.values()):
        classes = _numbered({label: value for label, value in numbers.items() if value is not None}, first, wanted)
    elif any(isinstance(label, int) for label in first):
        raise _mixed(first)
    else:
        classes = _named([str(label) for label in first], first, wanted)
    if len(set((classes.numbers or {}).values())) < 2:
        raise refuse("all records have the same label", value=next(iter(first)), hint="it takes two classes to learn")
    return classes


def number(label: Category) -> int | None:
    """The number that a label is, however it is spelt (CSV files have texts only); None for a name."""
    if isinstance(label, int):
        return label
    return int(label) if label.isdecimal() and label.isascii() and str(int(label[:9])) == label else None


def _numbered(numbers: Mapping[Category, int], first: Mapping[Category, str], wanted: int) -> Classes:
    highest = max(numbers, key=lambda label: numbers[label])
    there = wanted or numbers[highest] + 1
    if numbers[highest] >= min(there, MOST):
        what = f"the classes are 0 … {there - 1}" if wanted else f"this release knows classes 0 … {MOST - 1}"
        hint = "raise num_labels, or leave it out" if wanted else "number the classes from 0 without gaps"
        raise refuse(f"the label is too high: {what}", where=first[highest], value=highest, hint=hint)
    return Classes(tuple(f"LABEL_{n}" for n in range(there)), numbers)


def _named(names: list[str], first: Mapping[Category, str], wanted: int) -> Classes:
    names = sorted(names)
    if wanted and len(names) != wanted:
        raise refuse(
            f"num_labels: the data has {len(names)} labels",
            where=first[names[-1]] if len(names) > wanted else "",
            value=wanted,
            choices=names[:20],
            hint=f"num_labels: {len(names)}, or leave it out; is one of them misspelt?",
        )
    return Classes(tuple(names), {name: n for n, name in enumerate(names)})


def _mixed(first: Mapping[Category, str]) -> Refusal:
    begins = next(iter(first))
    other = next(label for label in first if (number(label) is None) != (number(begins) is None))
    kinds = ("a name", "a number") if number(other) is None else ("a number", "a name")
    return refuse(
        f"this label is {kinds[0]}, the first one ({first[begins]}) {kinds[1]}",
        where=first[other],
        value=other,
        hint="label every record by name, or every one by number",
    )


def counted(folder: Path, splits: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """names, and for each split how many records of its windows each class has; of rows without labels no names."""
    if not classes.names:
        return {"names": []}
    numbers = {split: Windows(folder, split, facts).margins().astype(int) for split, facts in splits.items()}
    counts = {split: np.bincount(found, minlength=len(classes.names)).tolist() for split, found in numbers.items()}
    return {"names": list(classes.names), **counts}
