"""Windows taken apart and put together: a row for each document, a prompt with another's answer, a reference beside it.

A prompt with another's answer is what KTO measures by how far a model has moved (Ethayarajh et al. 2024). The other
answer is that of the document before it in the prepared data, the last one's for the first. So the pairing is the same
for every order, batch and number of ranks, and a reference can be computed for it once. Where the data has several
answers to one prompt, they had better not stand together: such a pair is no mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hpcft.train.protocols import CHAT, Window, Windows


@dataclass(frozen=True)
class Plain:
    """Fulfils ``protocols.Window``. reference, reference_of_others: of each document, None where nobody computed it."""

    tokens: np.ndarray
    trained: np.ndarray
    documents: Sequence[int]
    kinds: Sequence[int]
    margins: Sequence[float]
    reference: Sequence[float] | None = None
    reference_of_others: Sequence[float] | None = None


def plain(window: Window) -> Plain:
    """The window of any kind."""
    return Plain(
        window.tokens, window.trained, window.documents, window.kinds, window.margins,
        getattr(window, "reference", None), getattr(window, "reference_of_others", None),
    )  # fmt: skip


def apart(window: Plain) -> Iterator[Plain]:
    """A window for each document: without packing both answers of a pair have rows of their own."""
    for i, (tokens, trained) in enumerate(_documents(window)):
        reference = None if window.reference is None else window.reference[i : i + 1]
        yield Plain(tokens, trained, [len(tokens)], window.kinds[i : i + 1], window.margins[i : i + 1], reference)


def mismatched(windows: Windows, index: int, longest: int) -> Plain:
    """Window ``index`` with other answers, each document cut to ``longest`` tokens."""
    window = windows[index]
    own = _documents(window)
    before = [_documents(windows[index - 1 if index else len(windows) - 1])[-1], *own[:-1]]
    made = [_joined(document, other, longest) for document, other in zip(own, before, strict=True)]
    tokens, trained = (np.concatenate([document[part] for document in made]) for part in (0, 1))
    reference = getattr(window, "reference_of_others", None)
    lengths = [len(document[0]) for document in made]
    return Plain(tokens, trained, lengths, [CHAT] * len(made), [0.0] * len(made), reference)


Document = tuple[np.ndarray, np.ndarray]  # tokens, trained


def _documents(window: Window | Plain) -> list[Document]:
    ends = np.cumsum(window.documents)[:-1]
    return list(zip(np.split(window.tokens, ends), np.split(window.trained, ends), strict=True))


def _joined(document: Document, other: Document, longest: int) -> Document:
    """The prompt, what stands before the first trained token, of one and the rest of the other."""
    prompt, answer = _prompt(document), _prompt(other)
    tokens = np.concatenate([document[0][:prompt], other[0][answer:]])[:longest]
    trained = np.concatenate([np.zeros(prompt, dtype=np.bool_), other[1][answer:]])[:longest]
    return tokens, trained


def _prompt(document: Document) -> int:
    return int(np.argmax(document[1])) if document[1].any() else len(document[1])
