"""Whole documents into windows of at most ``capacity`` tokens, best fit decreasing; the same windows every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Documents' numbers, window by window. Longest first, each into the window that it fills best.

    ``fits`` has bit r set while some window has room for exactly r tokens, so the smallest sufficient room is
    found by one shift: the work is a sort plus, per document, a few machine words for every 64 tokens of capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    fits = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        if not 0 < length <= capacity:
            raise ValueError(f"document {document} has {length} tokens, a window holds 1 … {capacity}")
        if candidates := fits >> length:
            room = length + (candidates & -candidates).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                fits ^= 1 << room
        else:
            room, window = capacity, len(windows)
            windows.append([])
        windows[window].append(document)
        if left := room - length:
            with_room.setdefault(left, []).append(window)
            fits |= 1 << left
    return windows


def one_each(documents: int) -> list[list[int]]:
    """Unpacked: every document is a window of its own."""
    return [[document] for document in range(documents)]
