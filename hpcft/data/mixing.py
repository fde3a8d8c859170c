"""Which rows are taken, how often, and for which split; every choice is a function of the seed and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcft.errors import refuse
from hpcft.plan.plan import Source

Digests = NDArray[np.uint64]
Copies = NDArray[np.int64]
"""For each row of a source, how many times it is taken."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source. groups: equal for rows that must not stand on both sides of a validation split."""

    digests: Digests
    groups: Digests


@dataclass(frozen=True)
class Choice:
    """Copies of every row, source by source.

    duplicates: rows of train that equal an earlier one there, told by 64 bits of a hash; held_duplicates: the same of
    validation. overlap: validation rows that are in train too. prompts: those of whose group there are some in train.
    """

    train: list[Copies]
    validation: list[Copies]
    duplicates: int
    held_duplicates: int
    overlap: int
    prompts: int


def choose(
    train: Sequence[Source],
    rows: Sequence[Rows],
    validation: Sequence[Source],
    held: Sequence[Rows],
    ratio: float,
    seed: int,
) -> Choice:
    """Choose from the rows of the train sources (``rows``) and of the validation sources (``held``).

    Raises Refusal where some sources of the run have a weight and others do not.
    """
    copies = sampled(train, [len(r.digests) for r in rows], seed)
    held_copies = sampled(validation, [len(r.digests) for r in held], seed)
    if not validation:
        held, held_copies = rows, set_aside([r.groups for r in rows], copies, ratio, seed)
        copies = [np.where(aside > 0, 0, taken) for taken, aside in zip(copies, held_copies, strict=True)]
    taken, aside = _taken([r.digests for r in rows], copies), _taken([r.digests for r in held], held_copies)
    twice, held_twice = (len(some) - len(np.unique(some)) for some in (taken, aside))
    groups, aside_groups = _taken([r.groups for r in rows], copies), _taken([r.groups for r in held], held_copies)
    overlap, prompts = int(np.isin(aside, taken).sum()), int(np.isin(aside_groups, groups).sum())
    return Choice(copies, held_copies, twice, held_twice, overlap, prompts)


def sampled(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> list[Copies]:
    """Copies by ``path#N`` and weights. N ≤ size: a sample; N > size: whole passes and a sample for the remainder."""
    wanted = [size if source.rows is None else source.rows for source, size in zip(sources, sizes, strict=True)]
    wanted = weighted(wanted, [source.weight for source in sources])
    return [_some(size, want, seed, number) for number, (size, want) in enumerate(zip(sizes, wanted, strict=True))]


def weighted(wanted: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """The same number of rows in all, shared out by weight (largest remainders); unchanged where nobody has one."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(wanted)
    if len(given) < len(weights) or sum(given) <= 0 or min(given) < 0:
        raise refuse(
            "weights of datasets: give every dataset of the run a weight of at least 0, or none", value=weights
        )
    exact = np.array(given) / sum(given) * sum(wanted)
    rows = np.floor(exact).astype(np.int64)
    for index in np.argsort(rows - exact, kind="stable")[: sum(wanted) - int(rows.sum())]:
        rows[index] += 1
    return [int(count) for count in rows]


def set_aside(groups: Sequence[Digests], copies: Sequence[Copies], ratio: float, seed: int) -> list[Copies]:
    """One copy of about ``ratio`` of the chosen rows. Those of a group go together: none is seen on both sides."""
    taken = _taken(groups, copies)
    goal = min(max(1, round(ratio * len(taken))), len(taken) - 1) if ratio > 0 else 0
    unique, counts = np.unique(taken, return_counts=True)
    order = np.argsort(mixed(unique, seed), kind="stable")
    many = min(int(np.searchsorted(np.cumsum(counts[order]), goal)) + 1, len(unique) - 1) if goal > 0 else 0
    aside = unique[order[: max(many, 0)]]
    return [((c > 0) & np.isin(group, aside)).astype(np.int64) for group, c in zip(groups, copies, strict=True)]


def mixed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """``values`` hashed with ``seed`` (splitmix64's finaliser): the same on every machine and release of numpy."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _some(size: int, wanted: int, seed: int, number: int) -> Copies:
    passes, rest = divmod(wanted, size) if size else (0, 0)
    copies = np.full(size, passes, np.int64)
    order = np.argsort(mixed(np.arange(size, dtype=np.uint64), seed * 1_000_003 + number), kind="stable")
    copies[order[:rest]] += 1
    return copies


def _taken(rows: Sequence[Digests], copies: Sequence[Copies]) -> Digests:
    parts = [digests[taken > 0] for digests, taken in zip(rows, copies, strict=True)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)
