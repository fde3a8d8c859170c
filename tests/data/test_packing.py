"""Packing keeps every document whole and once, fills windows well, and does the same thing every time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hpcft.data.packing import best_fit, one_each


def test_every_document_is_in_one_window_and_no_window_is_overfull() -> None:
    draw = np.random.default_rng(0)
    for capacity in (1, 7, 64, 1000):
        lengths = draw.integers(1, capacity + 1, size=300)
        windows = best_fit(lengths, capacity)
        assert sorted(n for window in windows for n in window) == list(range(300))
        assert all(lengths[window].sum() <= capacity for window in windows)


def test_a_document_goes_where_it_fills_best() -> None:
    assert best_fit([6, 5, 5, 4, 3], 10) == [[0, 3], [1, 2], [4]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_instruction_like_lengths_are_packed_nearly_full() -> None:
    lengths = np.minimum(np.random.default_rng(1).lognormal(5.2, 0.7, size=5000).astype(int) + 1, 2048)
    windows = best_fit(lengths, 2048)
    assert lengths.sum() / (len(windows) * 2048) > 0.99


def test_a_hundred_thousand_documents_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(2).integers(1, 4096, size=100_000)
    start = time.process_time()
    best_fit(lengths, 32_768)
    assert time.process_time() - start < 10


def test_a_document_longer_than_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 11 tokens"):
        best_fit([3, 11], 10)


def test_unpacked_is_a_window_each() -> None:
    assert one_each(3) == [[0], [1], [2]]
