"""Which characters of a rendered conversation are trained, found for any chat template by rendering it in parts.

No template is known here and none needs generation tags. For an assistant turn, three questions are asked in turn:

1. Does the whole text begin with the turns before it plus the opening of an assistant turn, and with the turns up
   to and including it? Then what lies between is the turn, exactly as a model would have to write it.
2. Only the first holds (templates that drop the thoughts of earlier turns, or close the last turn in a special
   way)? Then the turn ends at the first token that closes it when it stands last.
3. Neither (templates that put the system prompt into the last user turn)? Then the turn is rendered once more with
   other words in it, and the words lie between what stays the same before and after. So does a turn that calls
   tools, once plain words stand in its place.

A turn for which none holds makes the row unrenderable: it is refused by name, never guessed. So is a row with a turn
of anybody else that the text does not have: its answers would be learned without what they answer.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hpcft.data.rows import Message

STAND_IN = "hpcft0stand0in0for0words"
THOUGHTS = frozenset(("reasoning_content", "reasoning", "thinking"))  # where a turn has them beside its words
THINK = re.compile(r"</?think>")
PATIENCE = 3  # batches of texts that the template may refuse before each text is asked for alone


class Unrenderable(ValueError):
    """The template cannot write this row, or what it wrote cannot be told apart."""


class Render(Protocol):
    """A chat template as a function: turns → text; ``prompt``: with the opening of an assistant turn at the end."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str: ...

    def many(self, asked: Sequence[tuple[Sequence[Message], int]], prompt: bool) -> list[str]:
        """The first so many turns of each conversation, without tools, as text. Raises Unrenderable at a fault."""
        ...


@dataclass(frozen=True)
class Span:
    """Characters ``start`` … ``end`` of the text are the words of turn ``turn``; closed: a special token ends them.

    whole: all that the row has the assistant say in that turn, its thoughts too, is among them.
    """

    turn: int
    start: int
    end: int
    closed: bool
    whole: bool = True


class Masker:
    """Finds the spans of a conversation. specials: the texts of the tokenizer's special tokens."""

    def __init__(self, render: Render, specials: Sequence[str]) -> None:
        self.render = render
        some = "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)) or r"(?!)"
        self.specials = tuple(specials)
        self.run = re.compile(rf"(?:{some})+")
        self.first = re.compile(rf"\s*(?:{some})")
        self.ahead: dict[tuple[int, int, bool], str] = {}
        self.refused = 0

    @contextlib.contextmanager
    def rendered(self, conversations: Iterable[Sequence[Message]]) -> Iterator[None]:
        """Inside of the block ``spans`` finds what it will ask for of these, which have no tools, rendered already.

        One call for hundreds of texts takes half as long as hundreds of calls, and gives the same texts. Where one
        text of them cannot be had all are asked for one by one, and after a few such times always.
        """
        answers = [(turns, _answered(turns)) for turns in conversations]
        for prompt in (False, True):
            asked = [(turns, n) for turns, places in answers for n in _prefixes(turns, places, prompt)]
            if not asked or self.refused >= PATIENCE:
                continue
            try:
                texts = self.render.many(asked, prompt)
            except Unrenderable:
                self.refused += 1
                continue
            self.ahead.update(((id(turns), n, prompt), text) for (turns, n), text in zip(asked, texts, strict=True))
        try:
            yield
        finally:
            self.ahead.clear()

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """The whole text, and the span of every turn that may be trained, in order. Raises Unrenderable.

        Those are the assistant's turns that say something, and any other turn whose ``loss`` is true.
        """
        text = self._text(messages, tools)
        spans, written = [], list(_written(messages, tools))
        for turn, message in enumerate(messages):
            if _answers(message):
                span = self._assistant(text, messages, tools, turn)
                piece = text[span.start : span.end]
                self._check_calls(piece, messages, tools, turn)
                spans.append(span if _is_whole(piece, message) else replace(span, whole=False))
            elif message["role"] != "assistant":
                self._check_written(text, messages, tools, turn, written)
                if message.get("loss"):
                    spans.append(self._substituted(text, messages, tools, turn))
        return text, spans

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The text of a conversation in which nothing is to be told apart. Raises Unrenderable."""
        text = self._text(messages, tools)
        written = list(_written(messages, tools))
        for turn in range(len(messages)):
            self._check_written(text, messages, tools, turn, written)
        return text

    def _text(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        return self.ahead.get((id(messages), len(messages), False)) or self.render(messages, tools, False)

    def _check_written(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int, written: Sequence[str]
    ) -> None:
        """Raises Unrenderable where the words of a turn are not in ``text``.

        They are where ``text`` has them as often as ``written``, all that is to be there. Where it does not they may be
        there in another form (a result as JSON, a switch taken out of the user's words), or others may quote them. Then
        other words in their place would be there as well, or would be refused.
        """
        message = messages[turn]
        words = message["content"].strip()
        spellings = {words, json.dumps(words, ensure_ascii=False)[1:-1]}
        if not words or _many(spellings, [text]) >= _many(spellings, written):
            return
        other = self._try([*messages[:turn], {**message, "content": STAND_IN}, *messages[turn + 1 :]], tools, False)
        if other is not None and STAND_IN not in other.lower():
            raise Unrenderable(f"the chat template does not write turn {turn + 1} ({message['role']})")

    def _check_calls(self, piece: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int) -> None:
        """Raises Unrenderable where a call is not in ``piece``, the turn as written: nothing would be trained.

        Where words, thoughts or arguments have the name of a function too, other names are written in its place.
        """
        message = messages[turn]
        if not message.get("tool_calls"):
            return
        for name, many in Counter(str(call["function"]["name"]) for call in message["tool_calls"]).items():
            there = piece.count(name) >= many
            if there and _says_so(message, name):
                there = self._writes_calls(messages, tools, turn, name)
            if not there:
                raise Unrenderable(f"the chat template does not write the tool call {name} of turn {turn + 1}")

    def _writes_calls(self, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int, name: str) -> bool:
        """Whether the calls of the function ``name`` are all written, told by other names in their place."""
        calls = list(messages[turn]["tool_calls"])
        places = [n for n, call in enumerate(calls) if str(call["function"]["name"]) == name]
        for n in places:
            calls[n] = {**calls[n], "function": {**calls[n]["function"], "name": f"{STAND_IN}{n}x"}}
        upto = [*messages[:turn], {**messages[turn], "tool_calls": calls}]
        other = self._try(upto, tools, False) or self._try([*upto, *messages[turn + 1 :]], tools, False)
        return other is None or all(f"{STAND_IN}{n}x" in other for n in places)

    def _assistant(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int) -> Span:
        opened = self._opened(text, messages, tools, turn)
        if opened:
            start, message = len(opened), messages[turn]
            last = turn == len(messages) - 1
            upto = text if last else self._upto(messages, turn + 1, tools, False)
            if upto and text.startswith(upto) and _has_last_words(text[start : len(upto)], message):
                return self._closed(text, Span(turn, start, len(upto), False), message)
            if upto and upto.startswith(opened) and (span := self._shortened(text, upto, start, message, turn)):
                return span
        return self._substituted(text, messages, tools, turn, opened)

    def _opened(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int) -> str | None:
        """What a model is given before it writes ``turn``, if ``text`` begins with it.

        None for a template that ignores the prompt flag: it says nothing about where the assistant's header ends.
        """
        before, opened = (self._upto(messages, turn, tools, prompt) for prompt in (False, True))
        return opened if opened and opened != before and text.startswith(opened) else None

    def _shortened(self, text: str, upto: str, start: int, message: Message, turn: int) -> Span | None:
        """The turn as ``text`` has it, ended by the token that ends it in ``upto``; None if it loses its last words."""
        alone = self._closed(upto, Span(turn, start, len(upto), False), message)
        closing = upto[self._words_end(upto, start, len(upto)) : alone.end].lstrip()
        at = text.find(closing, start) if alone.closed else -1
        kept = text[start:at].strip()
        if at < 0 or not kept or not message["content"].strip().endswith(kept):
            return None
        return Span(turn, start, at + len(closing), True)

    def _substituted(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        turn: int,
        opened: str | None = None,
    ) -> Span:
        """The words of a turn, found by rendering others in their place; from ``opened`` on where that is known."""
        message = messages[turn]
        calls = bool(message.get("tool_calls"))
        instead = {"role": "assistant", "content": STAND_IN} if calls else {**message, "content": STAND_IN}
        other = self._try([*messages[:turn], instead, *messages[turn + 1 :]], tools, False)
        before, found, after = (other or "").partition(STAND_IN)
        common = before.rstrip() if calls else before  # the white space before plain words may not be before calls
        start, end = len(common), len(text) - len(after)
        words = text[start:end].strip()
        whole = words and (_has_last_words(words, message) if calls else words in message["content"])
        if not (found and text.startswith(common) and text.endswith(after) and whole):
            raise Unrenderable(
                f"the chat template writes turn {turn + 1} ({message['role']}) so that its words cannot be told "
                "from the template's own"
            )
        if message["role"] != "assistant":
            return Span(turn, start, end, False)
        if opened and len(opened) <= len(before):
            start = len(opened)
        else:
            start -= _unprompted(common, self._upto(messages, turn, tools, True))
        closing = self.first.match(text, end)
        return Span(turn, start, closing.end() if closing else end, closing is not None)

    def _closed(self, text: str, span: Span, message: Message) -> Span:
        """``span`` cut behind what ends the turn: line breaks after it are the template's, not the model's.

        After plain words that is the first special token, with those that touch it (some templates close the whole
        text a line further down); after tool calls, which have special tokens of their own, it is the last one.
        Where nothing ends a turn but the beginning of the next, the token that begins it does.
        """
        words_end = self._words_end(text, span.start, span.end)
        found = [match.end() for match in self.run.finditer(text, words_end, span.end)]
        if found:
            return Span(span.turn, span.start, found[-1] if message.get("tool_calls") else found[0], True)
        following = self.first.match(text, words_end)
        return Span(span.turn, span.start, following.end() if following else words_end, following is not None)

    def _words_end(self, text: str, start: int, end: int) -> int:
        """Where, before ``end``, nothing follows but special tokens and white space."""
        end = start + len(text[start:end].rstrip())
        while text.endswith(self.specials, start, end):
            end = max(m for m in (end - len(s) for s in self.specials if text.endswith(s, start, end)) if m >= start)
            end = start + len(text[start:end].rstrip())
        return end

    def _upto(self, messages: Sequence[Message], turns: int, tools: Sequence[Any] | None, prompt: bool) -> str | None:
        """The first ``turns`` turns, from what was rendered ahead where they are there."""
        known = self.ahead.get((id(messages), turns, prompt))
        return self._try(messages[:turns], tools, prompt) if known is None else known

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str | None:
        """A part of a conversation, or None: some templates refuse parts that are not conversations of their own."""
        try:
            return self.render(messages, tools, prompt) if messages else None
        except Unrenderable:
            return None


def says_something(message: Message) -> bool:
    """Whether an assistant's turn has words or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def _answers(message: Message) -> bool:
    """Whether a turn is the assistant's, says something, and is not silenced."""
    return bool(message["role"] == "assistant" and message.get("loss", True) and says_something(message))


def _answered(messages: Sequence[Message]) -> list[int]:
    """The places of the turns that ``_answers`` says."""
    return [turn for turn, message in enumerate(messages) if _answers(message)]


def _prefixes(messages: Sequence[Message], answers: Sequence[int], prompt: bool) -> list[int]:
    """How many turns of a conversation each text has that ``Masker.spans`` asks for first."""
    before = [turn for turn in answers if turn]
    return before if prompt else sorted({len(messages), *before, *(turn + 1 for turn in answers)})


def _written(messages: Sequence[Message], tools: Sequence[Any] | None) -> Iterator[str]:
    """All that a template may write of a conversation: the words of its turns, the rest as JSON."""
    for message in messages:
        yield message["content"]
        if len(message) > 2:
            rest = {key: value for key, value in message.items() if key not in ("role", "content", "loss")}
            yield json.dumps(rest, ensure_ascii=False, default=str)
    if tools:
        yield json.dumps(tools, ensure_ascii=False, default=str)


def _many(spellings: Iterable[str], texts: Iterable[str]) -> int:
    """How often ``texts`` have any of ``spellings``."""
    return sum(text.count(spelling) for text in texts for spelling in spellings)


def _has_last_words(piece: str, message: Message) -> bool:
    """Whether a turn as written ends with the row's words: a template that wants another kind of content drops them."""
    said = message["content"]
    behind = said.rpartition("</think>")[2]  # a template may begin a new line there
    words = (behind if behind.strip() else said).rsplit(None, 1)
    return not words or words[-1][-16:] in piece


def _is_whole(piece: str, message: Message) -> bool:
    """Whether all of the words and thoughts are in a turn as written, white space and the marks of thoughts aside."""
    if message["content"].strip() in piece and THOUGHTS.isdisjoint(message):
        return True
    thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    parts = [part for said in (message["content"], *thoughts) for part in THINK.split(said)]
    there = _solid(piece)
    return all(_solid(part) in there for part in parts)


def _solid(text: str) -> str:
    return "".join(text.split())


def _says_so(message: Message, name: str) -> bool:
    """Whether words or thoughts of a turn, or the arguments of its calls, have ``name`` in them."""
    rest = {key: value for key, value in message.items() if key not in ("role", "tool_calls")}
    arguments = [call["function"].get("arguments") for call in message["tool_calls"]]
    return name in json.dumps([rest, arguments], ensure_ascii=False, default=str)


def _unprompted(before: str, opened: str | None) -> int:
    """How much of the white space before the words the model has to write, for the prompt does not give it."""
    if opened is None:
        return 0
    there, given = (len(text) - len(text.rstrip()) for text in (before, opened))
    return max(0, there - given)


def wanted(spans: Sequence[Span], messages: Sequence[Message], train_on: str) -> list[Span]:
    """The spans that carry loss. last_turn: only what the assistant says after the user's last words."""
    if train_on != "last_turn":
        return list(spans)
    last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return [span for span in spans if span.turn > last_user]
