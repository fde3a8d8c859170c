"""Rows that the chat template cannot write: several are gathered before the data is refused, to be mended together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.errors import Problem, Refusal

EXAMPLES = 5
FURTHER = 16  # portions that are looked at behind the first with such a row: nobody waits for all of a large file


def found(rows: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """(line, why) of the rows of one portion, as plain values."""
    return {"many": len(rows), "examples": list(rows[:EXAMPLES])}


@dataclass
class Refused:
    """What was found in the portions so far, in their order: the same for any number of workers."""

    examples: list[Problem] = field(default_factory=list)
    many: int = 0
    read: int = 0
    further: int = 0

    def add(self, shown: str, facts: dict[str, Any], rows: int) -> None:
        """Count a portion of the file ``shown`` with ``rows`` other rows. Raises Refusal once enough is known."""
        self.read += rows + facts["many"]
        self.many += facts["many"]
        self.further += self.many > 0
        for line, why in facts["examples"][: EXAMPLES - len(self.examples)]:
            self.examples.append(Problem(why, f"{shown}:{line}", hint=_hint(why)))
        if self.further > FURTHER:
            self.check()

    def check(self) -> None:
        """Raises Refusal where there is such a row."""
        if self.many > 1:
            what = f"{self.many:,} of the first {self.read:,} rows cannot be written with the chat template"
            named = f"the first {EXAMPLES} are named above" if self.many > EXAMPLES else "they are named above"
            raise Refusal([*self.examples, Problem(what, "data", hint=named)])
        if self.many:
            raise Refusal(self.examples)


def _hint(sentence: str) -> str:
    if "system" in sentence.lower():
        return "this template knows no system turn: remove it from the data, or set chat_template"
    return "hpcft trains on what the template writes: mend the row, or set chat_template to a template that takes it"
