"""The label audit for people: what was read, dropped and masked, how long records are, what ends a turn."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.data import histogram, stops
from hpcft.data import tokenizer as tokenizers
from hpcft.data.documents import Turn
from hpcft.data.kinds import Kind
from hpcft.data.store import Answer
from hpcft.errors import Refusal
from hpcft.plan.plan import DataPlan

SHOWN_CLASSES = 20
LOPSIDED = 0.8  # a class with a larger share of the records is worth a note
MANY_TOO_LONG = 0.25  # a larger share of the rows that is dropped for its length is worth a warning
BIASED = 1.25  # good answers this much longer than bad ones, or shorter, are worth a note
TURNS = {
    Turn.TRAINED: "trained",
    Turn.OTHERS: "not trained: the user's, the system's, tools'",
    Turn.EARLIER: "not trained: the assistant's before the last answer",
    Turn.SILENT: "not trained: loss is false",
    Turn.EMPTY: "not trained: empty",
}


def reported(data: DataPlan, answer: Answer) -> str:
    """The audit of prepared data, its picture drawn beside it; all that is worth a look before training."""
    lines = [table(answer.manifest, answer.names)]
    with contextlib.suppress(Refusal):  # a tokenizer that has gone away: the shards need it no more
        lines += stops.compared(answer.manifest["audit"], tokenizers.folder_of(data))
    return "\n".join([*lines, histogram.drawn(answer.folder, answer.manifest)])


def table(manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    """The counts. names: the data files' paths in the order of the manifest's ``files``."""
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
    if audit["turns"]:
        lines += ["", "turns", *_pairs({TURNS[t]: f"{audit['turns'][t]:,}" for t in TURNS if t in audit["turns"]})]
    lines += ["", "tokens in a row, before any was dropped or cut"]
    lines += ["  " + " · ".join(f"{name} {n:,}" for name, n in audit["row_tokens"].items())]
    if manifest["classes"]["names"]:
        lines += ["", *_classes(manifest)]
    elif any(kind != Kind.CHAT.word for kind in audit["kinds"]):
        lines += ["", "answers", *_pairs({kind: _answers(facts) for kind, facts in audit["kinds"].items()})]
    lines += ["", *_windows(manifest), "", *_lengths(manifest)]
    return "\n".join([*lines, "", *_notes(audit), *_class_notes(manifest["classes"])])


def _row_counts(audit: Mapping[str, Any]) -> dict[str, str]:
    rows = audit["rows"]
    counts = {name: f"{rows[name]:,}" for name in ("read", "kept")}
    counts |= {f"dropped: {why}": _dropped(audit, why) for why in audit["dropped"]}
    optional = {
        "split": rows["split"],
        "pieces of them": rows["pieces"],
        "truncated": rows["truncated"],
        "tokens cut off them": audit["tokens_cut"],
        "equal to an earlier row of train": audit["duplicates"],
        "equal to an earlier row of validation": audit["held_duplicates"],
        "in train and in validation": audit["overlap"],
        "whose prompt is in train and in validation": audit["prompts"] - audit["overlap"],
    }
    return counts | {name: f"{count:,}" for name, count in optional.items() if count}


def _dropped(audit: Mapping[str, Any], why: str) -> str:
    """How many rows, and what their tokens are of all: a few long rows may be most of the data."""
    tokens = audit["dropped_tokens"][why]
    return f"{audit['dropped'][why]:,}: {tokens:,} tokens, {tokens / max(1, audit['tokens_read']):.0%} of all"


def _answers(facts: Mapping[str, Any]) -> str:
    means = f"{facts['mean_trained']:,.0f} trained tokens in the mean, {facts['mean_tokens']:,.0f} with the prompt"
    return f"{facts['documents']:,} of {means}"


def _windows(manifest: Mapping[str, Any]) -> list[str]:
    """What the splits hold, a line each."""
    rows = [["", "windows", "of at most", "filled", _record(manifest) + "s", "tokens", "trained"]]
    for split, facts in manifest["splits"].items():
        trained = f"{facts['trained_tokens']:,} ({facts['trained_tokens'] / max(1, facts['tokens']):.0%})"
        counts = [f"{facts['windows']:,}", f"{facts['max_length']:,}", f"{facts['filled']:.1%}"]
        rows.append([split, *counts, f"{facts['rows']:,}", f"{facts['tokens']:,}", trained])
    return _aligned(rows)


def _lengths(manifest: Mapping[str, Any]) -> list[str]:
    """How many tokens a record has."""
    rows = [[f"tokens of a {_record(manifest)}", "mean", "p50", "p90", "p99", "max"]]
    for split, facts in manifest["statistics"].items():
        trained = [] if manifest["classes"]["names"] else [(f"{split}, trained", facts["trained"])]
        for name, spread in [(split, facts["tokens"]), *trained]:
            rows.append([name, f"{spread['mean']:,.0f}", *(f"{spread[q]:,}" for q in rows[0][2:])])
    return _aligned(rows)


def _classes(manifest: Mapping[str, Any]) -> list[str]:
    """How many records each class has; of many classes the largest ones."""
    classes, splits = manifest["classes"], list(manifest["splits"])
    order = sorted(range(len(classes["names"])), key=lambda n: -sum(classes[split][n] for split in splits))
    rows = [["class", *splits]]
    rows += [[classes["names"][n], *(f"{classes[split][n]:,}" for split in splits)] for n in order[:SHOWN_CLASSES]]
    return [*_aligned(rows), *([f"  … {len(order):,} classes in all"] if len(order) > SHOWN_CLASSES else [])]


def _class_notes(classes: Mapping[str, Any]) -> list[str]:
    """A warning where a class cannot be learned, a note where one is most of the data."""
    names, train = classes["names"], classes.get("train", [])
    lost = [name for name, records in zip(names, train, strict=True) if not records] if names else []
    notes = []
    if lost:
        some = ", ".join(lost[:5]) + (" …" if len(lost) > 5 else "")
        notes.append(f"warning: {len(lost)} of {len(names)} classes have no record in train: {some}")
    if names and max(train) > LOPSIDED * sum(train):
        most = f"{names[train.index(max(train))]} is {max(train) / sum(train):.0%} of train"
        notes.append(f"note: {most}: an accuracy below that is worse than saying it always")
    return notes


def _record(manifest: Mapping[str, Any]) -> str:
    return "pair" if Kind.CHOSEN.word in manifest["audit"]["kinds"] else "record"


def _notes(audit: Mapping[str, Any]) -> list[str]:
    notes, rows = [], audit["rows"]
    if rows["too_long"] > MANY_TOO_LONG * rows["read"]:
        share = f"{rows['too_long']:,} of {rows['read']:,} rows are longer than max_length"
        notes.append(f"warning: {share} and dropped: what is left may be another kind of text; raise max_length")
    for end in audit["end_tokens"]:
        eos = "the tokenizer's EOS" if end["id"] == audit["eos_token"]["id"] else f"EOS is {audit['eos_token']['text']}"
        notes.append(f"end of turn: {end['text']} (id {end['id']}) closes {end['turns']:,} trained turns; {eos}")
    if not audit["end_tokens"]:
        if Kind.LABELLED.word not in audit["kinds"]:
            notes.append("warning: no trained turn is closed by an end token, so the model will not learn to stop")
    elif unended := audit["turns"].get(Turn.UNENDED, 0):
        notes.append(f"warning: {unended:,} trained turns are closed by no end token: after them it learns to go on")
    if shortened := audit["turns"].get(Turn.SHORTENED, 0):
        of = f"{shortened:,} of {audit['turns'][Turn.TRAINED]:,} trained turns"
        notes.append(f"warning: the template leaves a part out of {of}, as a rule their thoughts: it is not learned")
    if rows["end_twice"]:
        notes.append(
            f"warning: in {rows['end_twice']:,} rows the end token stands twice: take it out of the answers' own words"
        )
    if rows["end_cut"]:
        notes.append(f"note: truncation cut the end of a trained turn off {rows['end_cut']:,} rows, which do not stop")
    if added := rows["end_added"]:
        notes.append(f"note: the template ends no turn, so EOS was added to {added:,} rows")
    if control := rows["control_words"]:
        notes.append(f"note: {control:,} rows spell a special token in their own words; it is read as that token")
    if unwritten := rows["tools_unwritten"]:
        notes.append(f"warning: {unwritten:,} rows have tools, which the template does not write: no model sees them")
    if texts := rows["arguments_text"]:
        notes.append(
            f"warning: in {texts:,} rows the arguments of a call are no JSON object: they are learned as they are"
        )
    notes += [note for note in (_length_bias(audit["kinds"]), _one_sided(audit["kinds"])) if note]
    if audit["fixed_date"]:
        notes.append(f"note: the template writes the date; {audit['fixed_date']} stands in all rows")
    return notes


def _length_bias(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """A note where good answers are much longer or shorter than bad ones: a model learns that sooner than quality."""
    for good, bad in ((Kind.CHOSEN.word, Kind.REJECTED.word), (Kind.DESIRABLE.word, Kind.UNDESIRABLE.word)):
        if good in kinds and bad in kinds:
            ratio = kinds[good]["mean_trained"] / kinds[bad]["mean_trained"]
            if not 1 / BIASED < ratio < BIASED:
                how = f"{ratio:.1f} times as long as" if ratio > 1 else f"{1 / ratio:.1f} times shorter than"
                return f"note: {good} answers are {how} {bad} ones, so the model may learn length before anything else"
    return ""


def _one_sided(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """A warning where rated answers are all good or all bad: nothing says what they are better or worse than."""
    rated = [kind for kind in (Kind.DESIRABLE.word, Kind.UNDESIRABLE.word) if kind in kinds]
    return f"warning: every answer is {rated[0]}, so there is nothing to tell it from" if len(rated) == 1 else ""


def _pairs(pairs: Mapping[str, str]) -> list[str]:
    width = max(map(len, pairs))
    return [f"  {name:<{width}}  {value}" for name, value in pairs.items()]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table: the first column to the left, the others to the right, its head not indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(len(rows[0][0]), *(len(row[0]) + 2 for row in rows[1:]), 0)
    lines = []
    for n, (name, *cells) in enumerate(rows):
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{('  ' if n else '') + name:<{widths[0]}}{numbers}")
    return lines
