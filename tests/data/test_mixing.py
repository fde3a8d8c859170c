"""Samples, passes, shares and the validation split are functions of the seed and the rows alone."""

from __future__ import annotations

import numpy as np
import pytest

from hpcft.data.mixing import Rows, choose, mixed, sampled, set_aside, weighted
from hpcft.errors import Refusal
from hpcft.plan.plan import Source


def digests(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_fewer_rows_than_there_are_is_a_seeded_sample_without_repeats() -> None:
    (copies,) = sampled([Source(path="a", rows=40)], [100], seed=1)
    assert copies.sum() == 40
    assert copies.max() == 1
    assert (copies == sampled([Source(path="b", rows=40)], [100], seed=1)[0]).all()
    assert (copies != sampled([Source(path="a", rows=40)], [100], seed=2)[0]).any()


def test_more_rows_than_there_are_is_whole_passes_and_a_sample() -> None:
    (copies,) = sampled([Source(path="a", rows=250)], [100], seed=1)
    assert copies.sum() == 250
    assert sorted(set(copies.tolist())) == [2, 3]


def test_sources_are_concatenated_when_nobody_asks_otherwise() -> None:
    copies = sampled([Source(path="a"), Source(path="b")], [3, 2], seed=1)
    assert [c.tolist() for c in copies] == [[1, 1, 1], [1, 1]]


def test_weights_share_out_the_same_number_of_rows() -> None:
    sources = [Source(path="a", weight=3.0), Source(path="b", weight=1.0)]
    assert [int(c.sum()) for c in sampled(sources, [10, 90], seed=1)] == [75, 25]
    assert weighted([1, 1, 1], [1.0, 1.0, 1.0]) == [1, 1, 1]
    assert sum(weighted([5, 5], [1.0, 2.0])) == 10


def test_a_weight_for_some_sources_only_is_refused() -> None:
    with pytest.raises(Refusal, match="every dataset"):
        sampled([Source(path="a", weight=1.0), Source(path="b")], [1, 1], seed=1)


def test_equal_rows_never_stand_on_both_sides_of_the_split() -> None:
    rows = [np.arange(100, dtype=np.uint64) % np.uint64(40), np.arange(60, dtype=np.uint64)]
    sources = [Source(path="a"), Source(path="b")]
    choice = choose(sources, [Rows(r, r) for r in rows], [], [], ratio=0.2, seed=5)
    train = {int(d) for digest, c in zip(rows, choice.train, strict=True) for d in digest[c > 0]}
    aside = [int(d) for digest, c in zip(rows, choice.validation, strict=True) for d in digest[c > 0]]
    assert not train & set(aside)
    assert len(train | set(aside)) == 60
    assert 32 <= len(aside) <= 40
    assert choice.overlap == 0
    assert choice.duplicates + choice.held_duplicates == 160 - 60
    assert choice.held_duplicates == len(aside) - len(set(aside)) > 0


def test_a_split_always_leaves_a_row_to_train_on_and_takes_one_aside() -> None:
    (copies,) = set_aside([digests(1, 2)], [np.array([1, 1])], ratio=0.001, seed=1)
    assert copies.sum() == 1
    (copies,) = set_aside([digests(1, 1, 1)], [np.array([1, 1, 1])], ratio=0.5, seed=1)
    assert copies.sum() == 0
    (copies,) = set_aside([digests(1, 2)], [np.array([1, 1])], ratio=0.0, seed=1)
    assert copies.sum() == 0


def test_rows_of_a_validation_file_that_are_in_train_too_are_counted() -> None:
    train, held = Rows(digests(1, 2, 3), digests(7, 8, 8)), Rows(digests(3, 4, 5), digests(8, 7, 9))
    choice = choose([Source(path="a")], [train], [Source(path="v")], [held], ratio=0.0, seed=1)
    assert (choice.overlap, choice.prompts) == (1, 2)
    assert [c.tolist() for c in choice.train] == [[1, 1, 1]]
    assert [c.tolist() for c in choice.validation] == [[1, 1, 1]]


def test_the_hash_is_the_published_one_so_choices_outlive_releases_of_numpy() -> None:
    # splitmix64 seeded with 0: its first outputs, from the reference implementation.
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.arange(3, dtype=np.uint64) * golden
    assert [hex(value) for value in mixed(states, 0).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
