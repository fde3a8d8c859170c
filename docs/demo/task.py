"""The task: put letters in order, forwards or backwards; and which letters the model may see while it learns."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SHORTEST, LONGEST = 3, 10  # letters in a question, all of them different
FORWARDS, BACKWARDS = "sort", "sort backwards"


class Example(NamedTuple):
    """A question and its only right answer."""

    question: str
    answer: str


def example(letters: str, order: str = FORWARDS) -> Example:
    """``sort dog`` → ``dgo``; ``sort backwards dog`` → ``ogd``."""
    return Example(f"{order} {letters}", "".join(sorted(letters, reverse=order == BACKWARDS)))


def examples(count: int, seed: int, without: Iterable[str] = ()) -> list[Example]:
    """``count`` examples, always the same for a seed; no two of the same letters, none of the letters of ``without``.

    Two questions of the same letters have the same answer. So each set of letters is asked once: whatever part of
    the list is held out, none of its answers can have been seen.
    """
    rng = random.Random(seed)
    known = {frozenset(word) for word in without}
    drawn: list[Example] = []
    while len(drawn) < count:
        letters = "".join(rng.sample(string.ascii_lowercase, rng.randint(SHORTEST, LONGEST)))
        if frozenset(letters) not in known:
            known.add(frozenset(letters))
            drawn.append(example(letters, rng.choice((FORWARDS, BACKWARDS))))
    return drawn


def unseen(held_out: Sequence[Example], trained: Sequence[Example]) -> bool:
    """Whether no question that is held out, and not even its letters in another order, is among the trained ones."""
    return {frozenset(e.answer) for e in held_out}.isdisjoint(frozenset(e.answer) for e in trained)


def write(path: Path, chosen: Sequence[Example]) -> None:
    """A JSON line for each example: a conversation of two turns, which is what hpcft reads."""
    turns = ([{"role": "user", "content": e.question}, {"role": "assistant", "content": e.answer}] for e in chosen)
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns), encoding="utf-8")


def read(path: Path) -> list[Example]:
    """What ``write`` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Example(*(turn["content"] for turn in json.loads(line)["messages"])) for line in lines]
