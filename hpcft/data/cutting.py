"""Documents within ``max_length``: dropped, cut or split as the truncation policy says, a pair's two together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpcft.data.documents import KEPT, TOO_LONG, UNTRAINED, Document

EQUAL = "the chosen answer and the rejected one are equal"
WRITTEN_EQUAL = f"{EQUAL} as the template writes them"  # though the row's are not: they differ in thoughts, say


def cut(whole: Document, limit: int, policy: str) -> Document:
    """The document of a row within ``limit`` tokens. Of a kept one something behind the first token is trained."""
    if whole.fate != KEPT:
        return whole
    if whole.length <= limit:
        whole.trained[0] = False  # as ``_keep``
        return whole
    if policy == "drop":
        return too_long(whole.length, limit)
    part = slice(-limit, None) if policy == "truncate_left" else slice(limit)
    if not _keep(whole, part):
        return Document(UNTRAINED, whole.length, f"{policy} to {limit} tokens cuts off all that would be trained")
    return whole


def too_long(length: int, limit: int) -> Document:
    """What becomes of a row of ``length`` tokens that is dropped for them."""
    return Document(TOO_LONG, length, f"{length} tokens, max_length is {limit}")


def split(text: Document, limit: int) -> Document:
    """A text with its pieces of at most ``limit`` tokens; or the text itself where it is no longer than that.

    A piece begins with the last token of the one before, to predict its own first one from: so each token of the text
    but the first, which no document trains, is trained once.
    """
    if text.fate == KEPT and text.length > limit:
        starts = range(0, text.length - 1, limit - 1)
        text.pieces = tuple(_piece(text, start, min(start + limit, text.length)) for start in starts)
        return text
    return cut(text, limit, "drop")


def _piece(text: Document, first: int, end: int) -> Document:
    trained = text.trained[first:end].copy()
    trained[0] = False
    return Document(KEPT, end - first, "", text.tokens[first:end], trained, _ends(text, first, end), kind=text.kind)


def _ends(document: Document, first: int, end: int) -> NDArray[np.int64]:
    """The ends of turns in a part of a document, by their places there."""
    return document.ends[(document.ends >= first) & (document.ends < end)] - first


def cut_pair(chosen: Document, rejected: Document, limit: int, policy: str) -> Document:
    """The two documents of a pair as one, within ``limit`` tokens together; or why it is none.

    truncate_left takes the same tokens from the beginning of both, so that both still answer the same prompt;
    truncate_right shortens the longer answer first, for what it says beyond the other's length.
    """
    length = chosen.length + rejected.length
    for document in (chosen, rejected):
        if document.fate != KEPT:
            return Document(document.fate, length, f"{document.kind.word} answer: {document.why}")
    if np.array_equal(chosen.tokens, rejected.tokens):
        return Document(UNTRAINED, length, WRITTEN_EQUAL)
    if length > limit and policy == "drop":
        return Document(TOO_LONG, length, f"{length} tokens in both answers with their prompts, max_length is {limit}")
    if why := _shortened(chosen, rejected, limit, policy):
        return Document(UNTRAINED, length, f"{policy} to {limit} tokens for both answers {why}")
    chosen.rejected = rejected
    return chosen


def _shortened(chosen: Document, rejected: Document, limit: int, policy: str) -> str:
    """Cut both; why that cannot be, or nothing."""
    over = max(0, chosen.length + rejected.length - limit)
    if policy == "truncate_left" and over:
        part = slice(-(-over // 2), None)
        if part.start >= shared_prompt(chosen, rejected):
            return "cuts off the whole prompt"
    else:
        part = slice(max(limit // 2, limit - min(chosen.length, rejected.length)))
    kept = [_keep(document, part) for document in (chosen, rejected)]
    if not all(kept):
        return "cuts off all that would be trained"
    return "leaves them equal" if np.array_equal(chosen.tokens, rejected.tokens) else ""


def shared_prompt(chosen: Document, rejected: Document) -> int:
    """How many tokens stand in both documents before the first trained one."""
    end = min(int(document.trained.argmax()) for document in (chosen, rejected))
    differ: NDArray[np.intp] = np.flatnonzero(chosen.tokens[:end] != rejected.tokens[:end])
    return int(differ[0]) if len(differ) else end


def _keep(document: Document, part: slice) -> bool:
    """Leave only ``part`` of the document; whether anything in it is trained."""
    trained = document.trained[part].copy()
    trained[:1] = False  # nothing stands before it to predict it from
    first, end, _ = part.indices(len(document.tokens))
    document.end_cut = bool((document.ends >= end).any())
    document.ends = _ends(document, first, end)
    document.truncated = len(trained) < document.length
    document.tokens, document.trained = document.tokens[part], trained
    return bool(trained.any())
