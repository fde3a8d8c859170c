"""The label audit: what became of every row and turn, in counts, and the refusals that follow from it.

``report`` shows it to people, ``statistics`` measures what was kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.documents import KEPT, TOO_LONG, UNTRAINED, Document, Turn
from hpcft.data.kinds import Kind
from hpcft.errors import Problem, Refusal, refuse
from hpcft.plan.plan import DataPlan

EXAMPLES = 3
COUNTERS = ("fates", "why", "lost", "ends", "flags", "turns")
FLAGS = ("truncated", "split", "end_added", "end_cut", "end_twice", "control", "tools_unwritten", "arguments_text")
QUANTILES = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


@dataclass
class Audit:
    """Counts of rows by fate, gathered document by document. A row that is repeated counts once.

    why: reason → rows that are dropped for it, lost: their tokens. ends: token → trained turns that it closes. cut:
    tokens that truncation took away. lengths: of rows before that.
    """

    fates: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    kinds: dict[int, list[int]] = field(default_factory=dict)  # documents, their tokens, their trained tokens

    def add(self, document: Document, origin: tuple[int, int]) -> None:
        """Count one row; origin: the number of its file, and its line."""
        self.fates[document.fate] += 1
        self.lengths.append(sum(part.length for part in document.both))
        if document.fate == KEPT:
            other = document.rejected
            for name in FLAGS:
                if getattr(document, name) or (other is not None and getattr(other, name)):
                    self.flags[name] += 1
            self.flags["pieces"] += len(document.pieces)
            for part in chain.from_iterable(record.both for record in document.records):
                self._count(part)
        else:
            reason = document.why if document.fate == UNTRAINED else document.fate
            self.why[reason] += 1
            self.lost[reason] += document.length
            examples = self.examples.setdefault(document.fate, [])
            if len(examples) < EXAMPLES:
                examples.append((*origin, document.why))

    def _count(self, document: Document) -> None:
        for token in document.end_tokens:
            self.ends[token] += 1
        for turn, many in document.turns.items():
            self.turns[turn] += many
        self.cut += document.length - len(document.tokens)
        sums = self.kinds.setdefault(document.kind, [0, 0, 0])
        for n, more in enumerate((1, len(document.tokens), int(np.count_nonzero(document.trained)))):
            sums[n] += more

    def counts(self) -> dict[str, Any]:
        """All but the lengths as plain values, to be added to another audit by ``add_counts``."""
        names = (*COUNTERS, "kinds")
        counts = {name: list(getattr(self, name).items()) for name in names}
        return {**counts, "cut": self.cut, "examples": self.examples}

    def add_counts(self, counts: dict[str, Any], lengths: NDArray[np.int64]) -> None:
        """Count what another audit has counted of later rows."""
        for name in COUNTERS:
            getattr(self, name).update(dict(counts[name]))
        self.cut += counts["cut"]
        for kind, more in counts["kinds"]:
            self.kinds[kind] = [a + b for a, b in zip(self.kinds.get(kind, (0, 0, 0)), more, strict=True)]
        for fate, examples in counts["examples"].items():
            mine = self.examples.setdefault(fate, [])
            mine += [(file, line, why) for file, line, why in examples[: EXAMPLES - len(mine)]]
        self.lengths.frombytes(lengths.astype(np.int64).tobytes())

    def check(self, data: DataPlan, names: Sequence[str]) -> None:
        """Raises Refusal where no row is left, or too large a share of the rows has nothing to train on.

        names: the data files' paths by number, for the examples.
        """
        rows = sum(self.fates.values())
        untrained, too_long = self.fates[UNTRAINED], self.fates[TOO_LONG]
        if not rows:
            raise refuse("no rows are chosen", hint="a dataset#N takes N rows; N must be at least 1")
        if untrained and (untrained == rows - too_long or untrained / rows > data.max_untrained_rows):
            share = f"{untrained} of {rows} rows ({untrained / rows:.0%}) have no token to train on"
            limit = f"max_untrained_rows allows {data.max_untrained_rows:.0%}"
            trained = f"; train_on is {data.train_on}" if data.rows == "chat" else ""
            raise self._refusal(UNTRAINED, names, share, limit + trained + self._too_short(data))
        if not self.fates[KEPT]:
            longest = f"the shortest row has {min(self.lengths)} tokens"
            hint = f"{longest}; raise max_length or set truncation_strategy"
            raise self._refusal(TOO_LONG, names, "every row is longer than max_length", hint)

    def check_split(self, split: str, data: DataPlan, names: Sequence[str]) -> None:
        """Raises Refusal where no row is left of a split whose rows these are and that the run asked for."""
        if self.fates[KEPT]:
            return
        rows, too_long, untrained = sum(self.fates.values()), self.fates[TOO_LONG], self.fates[UNTRAINED]
        if not rows:
            raise _nothing_in(split, data)
        counts = {"are too long": too_long, "have no token to train on": untrained}
        why = " and ".join(f"{count} of {rows} rows {words}" for words, count in counts.items() if count)
        hints = [f"the shortest row has {min(self.lengths)} tokens; raise max_length or set truncation_strategy"]
        hints = hints if too_long == rows else ["mend the rows, or raise max_length"]
        if split == "validation":
            hints += ["leave val_dataset out" if data.validation else "set another data_seed, which draws other rows"]
        fate = TOO_LONG if too_long else UNTRAINED
        raise self._refusal(fate, names, f"no row is left for {split}: {why}", ", or ".join(hints))

    def _too_short(self, data: DataPlan) -> str:
        """Of the hint: what would have kept rows of which the truncation left nothing to train on."""
        if not any(data.truncation in why for why in self.why):
            return ""
        return f"; raise max_length: {data.max_length} cuts them, the longest row has {max(self.lengths):,} tokens"

    def _refusal(self, fate: str, names: Sequence[str], what: str, hint: str) -> Refusal:
        examples = [Problem(why, f"{names[file]}:{line}") for file, line, why in self.examples.get(fate, ())]
        return Refusal([Problem(what, "data", hint=hint), *examples])

    def facts(self, tokenizer: Any) -> dict[str, Any]:
        """The audit as plain values for the manifest; the counts of splits and files are added by the writer."""
        lengths = np.array(self.lengths)
        quantiles = {name: int(np.quantile(lengths, q, method="nearest")) for name, q in QUANTILES.items()}
        ends = [
            {"id": id_, "text": str(tokenizer.convert_ids_to_tokens(id_)), "turns": turns}
            for id_, turns in sorted(self.ends.items(), key=lambda pair: (-pair[1], pair[0]))
        ]
        return {
            "rows": {
                "read": sum(self.fates.values()),
                "kept": self.fates[KEPT],
                "too_long": self.fates[TOO_LONG],
                "untrained": self.fates[UNTRAINED],
                "truncated": self.flags["truncated"],
                "split": self.flags["split"],
                "pieces": self.flags["pieces"],
                "end_added": self.flags["end_added"],
                "end_cut": self.flags["end_cut"],
                "end_twice": self.flags["end_twice"],
                "control_words": self.flags["control"],
                "tools_unwritten": self.flags["tools_unwritten"],
                "arguments_text": self.flags["arguments_text"],
            },
            "turns": {turn.value: self.turns[turn] for turn in Turn if self.turns[turn]},
            "tokens_cut": self.cut,
            "kinds": {
                Kind(kind).word: {
                    "documents": n,
                    "mean_tokens": round(tokens / n, 1),
                    "mean_trained": round(trained / n, 1),
                }
                for kind, (n, tokens, trained) in sorted(self.kinds.items())
            },
            "dropped": dict(self.why.most_common()),
            "dropped_tokens": dict(self.lost),
            "tokens_read": int(lengths.sum()),
            "examples": {fate: [list(example) for example in examples] for fate, examples in self.examples.items()},
            "row_tokens": quantiles,
            "end_token": ends[0] if ends else None,
            "end_tokens": ends,
            "eos_token": {"id": tokenizer.eos_token_id, "text": tokenizer.eos_token},
        }


def _nothing_in(split: str, data: DataPlan) -> Refusal:
    """The refusal of a split that no row fell into."""
    if split == "train" or data.validation:
        return refuse(f"no rows are chosen for {split}", hint="a dataset#N takes N rows; N must be at least 1")
    return refuse(
        "there are too few rows to set one aside for validation: equal ones stay on one side, and train needs one",
        where="split_dataset_ratio",
        value=data.validation_ratio,
        hint="add rows, name a val_dataset, or set split_dataset_ratio: 0, which trains without evaluation",
    )
