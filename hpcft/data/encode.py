"""Rows into documents: tokens, which of them are trained, and what became of each row. Runs in worker processes.

A row of a chat or a rated one becomes one document, a pair two. Each is encoded for itself as a *part*, a row of one
conversation; then the parts of a row are cut together, for they stand in one window.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcft.data import tokenizer as tokenizers
from hpcft.data.calls import CONTINUES, are_texts, joined
from hpcft.data.cutting import EQUAL, cut, cut_pair, split, too_long
from hpcft.data.documents import KEPT, UNTRAINED, Document, Turn
from hpcft.data.kinds import Kind
from hpcft.data.masks import Masker, Span, Unrenderable, says_something, wanted
from hpcft.data.reach import Encodings, Tokens
from hpcft.data.rows import Message, Row, filled, opened, undeveloped
from hpcft.data.values import Unusable
from hpcft.plan.plan import DataPlan

A_TOKEN = 6  # characters, more than texts have in the mean: a longer row is most likely too long
FEW = 4  # answers, for which what is trained is found in no time


@dataclass(frozen=True)
class Part:
    """One conversation of a row, and which of its tokens carry loss (``train_on``)."""

    row: Row
    kind: Kind
    train_on: str


class Encoder:
    """Turns rows into documents as one DataPlan says."""

    def __init__(self, data: DataPlan, tokenizer: Any) -> None:
        self.data = data
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.template = tokenizers.Template(tokenizer, data)
        self.encodings = Encodings(tokenizer)
        self.specials = special_tokens(tokenizer)
        self.masker = Masker(self.template, list(self.specials))
        self.firsts = {text[0]: [t for t in self.specials if t[0] == text[0]] for text in self.specials}
        given = {"{{NAME}}": data.model_name, "{{AUTHOR}}": data.model_author}
        self.names = {placeholder: name for placeholder, name in given.items() if name is not None}

    def documents(self, rows: Sequence[Row]) -> list[Document | str]:
        """A document for each row, or the sentence that says why it cannot be rendered."""
        unusable = dict[int, Document | str]()
        rows = [self._joined(n, row, unusable) for n, row in enumerate(rows)]
        rows = [self._prepared(row) for row in rows]
        dropped = unusable | self._dropped(rows)
        parts = [() if n in dropped else self._parts(row) for n, row in enumerate(rows)]
        encoded = iter(self._encoded([part for of_row in parts for part in of_row]))
        return [
            dropped[n] if n in dropped else self._of_row(row, islice(encoded, len(parts[n])))
            for n, row in enumerate(rows)
        ]

    def _joined(self, number: int, row: Row, unusable: dict[int, Document | str]) -> Row:
        """``row`` with the calls that continue a turn in it, where the template writes that; why not: in unusable."""
        if not any(CONTINUES in turn for turn in (*row.messages, *row.rejected)):
            return row
        joins = self.template.joins(row.tools is not None)
        try:
            return replace(row, messages=joined(row.messages, *joins), rejected=joined(row.rejected, *joins))
        except Unusable as error:
            unusable[number] = str(error)
            return Row(text="")

    def _dropped(self, rows: Sequence[Row]) -> dict[int, Document | str]:
        """Of conversations that seem much too long, those that are, by number.

        They are asked for their length first: to find what is trained takes a rendering of all turns for each answer.
        """
        limit, texts = self.data.max_length, dict[int, str]()
        if self.data.truncation not in ("drop", "split"):
            return {}
        for n, row in enumerate(rows):
            if _many_answers(row) and sum(len(turn["content"]) for turn in row.messages) > A_TOKEN * limit:
                with contextlib.suppress(Unrenderable):  # said where what is trained is looked for
                    texts[n] = self.template(row.messages, row.tools, False)
        lengths = [len(tokens.ids) for tokens in self.encodings(list(texts.values()), False)] if texts else []
        return {n: too_long(length, limit) for n, length in zip(texts, lengths, strict=True) if length > limit}

    def _encoded(self, parts: Sequence[Part]) -> list[Document | str]:
        """A whole document for each part, or the sentence why not."""
        rows = [part.row for part in parts]
        with self.masker.rendered(row.messages for row in rows if row.messages and not row.tools):
            rendered = [self._rendered(row) for row in rows]
        result: list[Document | str] = [item if isinstance(item, str) else "" for item in rendered]
        for special in (False, True):  # only raw text gets what the tokenizer adds: a template writes it
            chosen = [n for n, row in enumerate(rows) if (row.text is not None) is special and not result[n]]
            encoded = self.encodings([rendered[n][0] for n in chosen], special) if chosen else []
            for n, tokens in zip(chosen, encoded, strict=True):
                result[n] = self._document(parts[n], rendered[n][1], tokens)
        return result

    def _prepared(self, row: Row) -> Row:
        row = opened(row, self.data.system) if self.data.system else row
        row = row if self.template.knows_developers else undeveloped(row)
        return filled(row, self.names) if self.names else row

    def _parts(self, row: Row) -> tuple[Part, ...]:
        """Of a pair, what the assistant says after the prompt; of a rated row, after the user's last words."""
        if row.rejected:
            both = ((Kind.CHOSEN, row.messages), (Kind.REJECTED, row.rejected))
            return tuple(Part(Row(answering(turns, row.shared), row.tools), kind, "answer") for kind, turns in both)
        if row.category is not None:
            return (Part(row, Kind.LABELLED, "all"),)
        if row.label is not None:
            return (Part(row, Kind.DESIRABLE if row.label else Kind.UNDESIRABLE, "last_turn"),)
        return (Part(row, Kind.CHAT, self.data.train_on),)

    def _of_row(self, row: Row, parts: Iterable[Document | str]) -> Document | str:
        """What the parts of a row became as one document, within ``max_length``; or the first sentence why not."""
        documents: list[Document] = []
        for part in list(parts):
            if isinstance(part, str):
                return part
            part.tools_unwritten = row.tools is not None and not self.template.writes_tools
            documents.append(part)
        limit, policy = self.data.max_length, self.data.truncation
        if row.category is not None:
            return _at_its_end(cut(replace(documents[0], category=row.category), limit, policy))
        if policy == "split":
            return split(documents[0], limit) if row.text is not None else cut(documents[0], limit, "drop")
        if not row.rejected:
            return cut(documents[0], limit, policy)
        if row.shared == len(row.messages):
            return Document(UNTRAINED, sum(document.length for document in documents), EQUAL)
        chosen, rejected = (replace(document, margin=row.margin or 0.0) for document in documents)
        return cut_pair(chosen, rejected, limit, policy)

    def _rendered(self, row: Row) -> Any:
        """(text, spans) or the reason why not."""
        if row.text is not None:
            return row.text, [Span(0, 0, len(row.text), True)] if row.text.strip() else []
        try:
            if row.category is not None:  # nothing in it is to be told apart
                return self.masker.whole(row.messages, row.tools), []
            return self.masker.spans(row.messages, row.tools)
        except Unrenderable as error:
            return f"the chat template refuses this row: {error}"

    def _document(self, part: Part, spans: Sequence[Span], found: Tokens) -> Document | str:
        row, tokens, eos = part.row, found.ids, self.eos
        if part.kind == Kind.LABELLED:
            return _labelled(tokens)
        if row.text is not None:
            trained = np.full(len(tokens), bool(spans))
            closed = len(tokens) > 0 and bool(tokens[-1] == eos)
            ends = np.array([len(tokens) - 1] * (closed and bool(spans)), np.int64)
        else:
            spans = wanted(spans, row.messages, part.train_on)
            reached = [found.reach(span.start, span.end) for span in spans]
            trained = self._trained(part, reached, found)
            lasts = [past - 1 for span, (_, past) in zip(spans, reached, strict=True) if span.closed and past]
            ends = np.array(lasts, np.int64)
            closed = not spans or spans[-1].closed or spans[-1].turn < len(row.messages) - 1
        added = not closed and bool(trained.any())
        if added:
            if eos is None:
                return "nothing ends its last turn: neither the chat template nor the tokenizer has an end token"
            tokens, trained = np.append(tokens, np.int32(eos)), np.append(trained, True)
            ends = np.append(ends, len(tokens) - 1)
        if not trained[1:].any():
            return Document(UNTRAINED, len(tokens), why_untrained(row, part.train_on), kind=part.kind)
        return Document(
            *(KEPT, len(tokens), "", tokens, trained, ends, _turns(part, spans, added), part.kind),
            end_added=added,
            control=self._control(row),
            arguments_text=are_texts(row.messages),
        )

    def _trained(self, part: Part, reached: Sequence[tuple[int, int]], found: Tokens) -> NDArray[np.bool_]:
        row, all_ = part.row, part.train_on == "all"
        trained = np.ones(len(found.ids), np.bool_) if all_ else np.zeros(len(found.ids), np.bool_)
        if not all_:
            for first, past in reached:
                trained[first:past] = True
            return trained
        silent = [n for n, turn in enumerate(row.messages) if turn.get("loss") is False]
        if silent:
            loud = tuple({**turn, "loss": True} for turn in row.messages)
            _, every = self.masker.spans(loud, row.tools)
            for span in every:
                if span.turn in silent:
                    trained[slice(*found.reach(span.start, span.end))] = False
        return trained

    def _control(self, row: Row) -> bool:
        """Whether the row's own words spell a special token, which then becomes that token."""
        texts = [row.text] if row.text is not None else [str(turn["content"]) for turn in row.messages]
        return any(
            special in text
            for text in texts
            for first in self.firsts
            if first in text
            for special in self.firsts[first]
        )


def _many_answers(row: Row) -> bool:
    """Whether a row is one long conversation of which only a part is trained."""
    if row.rejected or row.category is not None:
        return False
    return sum(turn["role"] == "assistant" and says_something(turn) for turn in row.messages) > FEW


def _labelled(tokens: NDArray[np.int32]) -> Document:
    """A text that is scored: nothing is added to it, so that it is what a tokenizer makes of it at any time."""
    if len(tokens) < 2:
        return Document(UNTRAINED, len(tokens), "the text is empty or one token long", kind=Kind.LABELLED)
    return Document(KEPT, len(tokens), "", tokens, np.ones(len(tokens), np.bool_), kind=Kind.LABELLED)


def _at_its_end(document: Document) -> Document:
    """Of a labelled text the last token alone is trained: there its scores are."""
    document.trained[:-1] = False
    return document


def _turns(part: Part, spans: Sequence[Span], end_added: bool) -> Counter[str]:
    """What became of the turns of a conversation; raw text has none. end_added: to the last one."""
    messages, closed = part.row.messages, {span.turn: span.closed for span in spans}
    turns = Counter[str]([_turn(part, n in closed, turn) for n, turn in enumerate(messages)])
    if not all(closed.values()):
        unended = [n for n, ended in closed.items() if not ended and messages[n]["role"] == "assistant"]
        turns += Counter({Turn.UNENDED: len(unended) - (end_added and len(messages) - 1 in unended)})
    if shortened := sum(not span.whole for span in spans):
        turns[Turn.SHORTENED] = shortened
    return turns


def _turn(part: Part, in_spans: bool, turn: Message) -> Turn:
    if in_spans or (part.train_on == "all" and turn.get("loss") is not False):
        return Turn.TRAINED
    if turn["role"] != "assistant":
        return Turn.OTHERS
    if not says_something(turn):
        return Turn.EMPTY
    return Turn.SILENT if turn.get("loss") is False and part.train_on != "answer" else Turn.EARLIER


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text → id of the tokenizer's special tokens, those that may end a turn."""
    added = {str(token): int(id_) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def answering(turns: Sequence[Message], start: int) -> tuple[Message, ...]:
    """``turns`` with loss on what the assistant says from turn ``start`` on, and on nothing else."""
    return tuple(
        {**turn, "loss": n >= start and turn["role"] == "assistant" and turn.get("loss", True)}
        for n, turn in enumerate(turns)
    )


def why_untrained(row: Row, train_on: str) -> str:
    """Why a row has nothing to train on."""
    if row.text is not None:
        return "the text is empty or one token long"
    spoken = [turn for turn in row.messages if turn["role"] == "assistant"]
    if train_on == "answer":
        spoken = [turn for turn in spoken if turn["loss"]] or spoken
    if not spoken:
        return "no assistant turn"
    if not any(map(says_something, spoken)):
        return "the assistant's words are empty"
    if all(turn.get("loss") is False for turn in spoken):
        return "loss is false on every assistant turn"
    return "no assistant turn after the user's last words" if train_on == "last_turn" else "no trained token"
