"""The label audit: what became of every row, in counts; the refusals that follow from it; the table people read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data.documents import KEPT, TOO_LONG, UNTRAINED, Document
from hpcft.data.kinds import Kind
from hpcft.errors import Problem, Refusal, refuse
from hpcft.plan.plan import DataPlan

EXAMPLES = 3
BIASED = 1.25  # good answers this much longer than bad ones, or shorter, are worth a note
QUANTILES = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


@dataclass
class Audit:
    """Counts of rows by fate, gathered document by document. A row that is repeated counts once."""

    fates: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    kinds: dict[int, list[int]] = field(default_factory=dict)  # documents, their tokens, their trained tokens

    def add(self, document: Document, origin: tuple[int, int]) -> None:
        """Count one row; origin: the number of its file, and its line."""
        self.fates[document.fate] += 1
        self.lengths.append(sum(part.length for part in document.both))
        flags = ("truncated", "end_added", "control")
        self.flags.update(name for name in flags if any(getattr(part, name) for part in document.both))
        for part in document.both:
            self.ends.update(part.ends)
            if part.fate == KEPT:
                self._count(part)
        if document.fate != KEPT:
            reason = document.why if document.fate == UNTRAINED else document.fate
            self.why[reason] += 1
            examples = self.examples.setdefault(document.fate, [])
            if len(examples) < EXAMPLES:
                examples.append((*origin, document.why))

    def _count(self, document: Document) -> None:
        sums = self.kinds.setdefault(document.kind, [0, 0, 0])
        for n, more in enumerate((1, len(document.tokens), int(document.trained.sum()))):
            sums[n] += more

    def counts(self) -> dict[str, Any]:
        """All but the lengths as plain values, to be added to another audit by ``add_counts``."""
        names = ("fates", "why", "ends", "flags", "kinds")
        return {**{name: list(getattr(self, name).items()) for name in names}, "examples": self.examples}

    def add_counts(self, counts: dict[str, Any], lengths: NDArray[np.int64]) -> None:
        """Count what another audit has counted of later rows."""
        for name in ("fates", "why", "ends", "flags"):
            getattr(self, name).update(dict(counts[name]))
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
                "end_added": self.flags["end_added"],
                "control_words": self.flags["control"],
            },
            "kinds": {
                Kind(kind).word: {
                    "documents": n,
                    "mean_tokens": round(tokens / n, 1),
                    "mean_trained": round(trained / n, 1),
                }
                for kind, (n, tokens, trained) in sorted(self.kinds.items())
            },
            "dropped": dict(self.why.most_common()),
            "examples": {fate: [list(example) for example in examples] for fate, examples in self.examples.items()},
            "row_tokens": quantiles,
            "end_token": ends[0] if ends else None,
            "end_tokens": ends,
            "eos_token": {"id": tokenizer.eos_token_id, "text": tokenizer.eos_token},
        }


def table(manifest: dict[str, Any], names: Sequence[str]) -> str:
    """The audit for a person. names: the data files' paths in the order of the manifest's ``files``."""
    audit = manifest["audit"]
    lines = [f"prepared data {manifest['content']}", "", "files"]
    for file, name in zip(manifest["files"], names, strict=True):
        unread = ", ".join(f"{key} ({count:,})" for key, count in file["unread"].items())
        lines.append(
            f"  {name}: {file['rows']:,} rows of shape {file['shape']}, {file['taken']:,} taken"
            + (f"; keys not read: {unread}" if unread else "")
        )
    lines += ["", "rows", *_pairs(_row_counts(audit))]
    dropped = [example for examples in audit["examples"].values() for example in examples]
    lines += [f"  for example {names[file]}:{line}: {why}" for file, line, why in dropped]
    lines += ["", "tokens in a row", "  " + " · ".join(f"{name} {n:,}" for name, n in audit["row_tokens"].items())]
    if any(kind != Kind.CHAT.word for kind in audit["kinds"]):
        lines += ["", "answers", *_pairs({kind: _answers(facts) for kind, facts in audit["kinds"].items()})]
    for split, facts in manifest["splits"].items():
        lines += ["", split, *_pairs(_split_counts(facts))]
    return "\n".join([*lines, "", *_notes(audit)])


def _row_counts(audit: dict[str, Any]) -> dict[str, str]:
    rows = audit["rows"]
    counts = {"read": rows["read"], "kept": rows["kept"]}
    counts |= {f"dropped: {why}": count for why, count in audit["dropped"].items()}
    optional = {
        "truncated": rows["truncated"],
        "equal to an earlier row": audit["duplicates"],
        "in train and in validation": audit["overlap"],
        "whose prompt is in train and in validation": audit["prompts"] - audit["overlap"],
    }
    return {name: f"{count:,}" for name, count in (counts | {k: v for k, v in optional.items() if v}).items()}


def _answers(facts: dict[str, Any]) -> str:
    means = f"{facts['mean_trained']:,.0f} trained tokens in the mean, {facts['mean_tokens']:,.0f} with the prompt"
    return f"{facts['documents']:,} of {means}"


def _split_counts(facts: dict[str, Any]) -> dict[str, str]:
    documents = sum(facts["kinds"].values())
    return {
        "documents": f"{documents:,}" + (f" in {facts['rows']:,} pairs" if Kind.CHOSEN.word in facts["kinds"] else ""),
        "windows": f"{facts['windows']:,} of at most {facts['max_length']:,} tokens, {facts['filled']:.1%} filled",
        "tokens": f"{facts['tokens']:,}",
        "trained tokens": f"{facts['trained_tokens']:,} ({facts['trained_tokens'] / max(1, facts['tokens']):.0%})",
    }


def _notes(audit: dict[str, Any]) -> list[str]:
    notes = []
    for end in audit["end_tokens"]:
        eos = "the tokenizer's EOS" if end["id"] == audit["eos_token"]["id"] else f"EOS is {audit['eos_token']['text']}"
        notes.append(f"end of turn: {end['text']} (id {end['id']}) closes {end['turns']:,} trained turns; {eos}")
    if not audit["end_tokens"]:
        notes.append("warning: no trained turn is closed by an end token, so the model will not learn to stop")
    if added := audit["rows"]["end_added"]:
        notes.append(f"note: the template ends no turn, so EOS was added to {added:,} rows")
    if control := audit["rows"]["control_words"]:
        notes.append(f"note: {control:,} rows spell a special token in their own words; it is read as that token")
    if longer := _length_bias(audit["kinds"]):
        notes.append(longer)
    if lone := _one_sided(audit["kinds"]):
        notes.append(lone)
    if audit["fixed_date"]:
        notes.append(f"note: the template writes the date; {audit['fixed_date']} stands in all rows")
    return notes


def _length_bias(kinds: dict[str, dict[str, float]]) -> str:
    """A note where good answers are much longer or shorter than bad ones: a model learns that sooner than quality."""
    for good, bad in ((Kind.CHOSEN.word, Kind.REJECTED.word), (Kind.DESIRABLE.word, Kind.UNDESIRABLE.word)):
        if good in kinds and bad in kinds:
            ratio = kinds[good]["mean_trained"] / kinds[bad]["mean_trained"]
            if not 1 / BIASED < ratio < BIASED:
                how = f"{ratio:.1f} times as long as" if ratio > 1 else f"{1 / ratio:.1f} times shorter than"
                return f"note: {good} answers are {how} {bad} ones, so the model may learn length before anything else"
    return ""


def _one_sided(kinds: dict[str, dict[str, float]]) -> str:
    """A warning where rated answers are all good or all bad: nothing says what they are better or worse than."""
    rated = [kind for kind in (Kind.DESIRABLE.word, Kind.UNDESIRABLE.word) if kind in kinds]
    return f"warning: every answer is {rated[0]}, so there is nothing to tell it from" if len(rated) == 1 else ""


def _pairs(pairs: dict[str, str]) -> list[str]:
    width = max(map(len, pairs))
    return [f"  {name:<{width}}  {value}" for name, value in pairs.items()]
