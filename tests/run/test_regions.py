"""Any span of a tensor is filled from any others of it, whatever cut them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from hpcft.run.regions import Region, Span, meeting, tiles

WHOLE = {
    "vector": (7,),
    "matrix": (6, 8),
    "cube": (3, 4, 5),
    "scalar": (),
}


def numbers(span: Span, tensor: np.ndarray) -> np.ndarray:
    """What the span holds of ``tensor``, by indexing alone."""
    if span.region is not None:
        index = [n for start, length in span.region.slices for n in range(start, start + length)]
        tensor = np.take(tensor, index, axis=span.region.dim)
    return tensor.reshape(-1)[span.offset : span.offset + span.length]


def cuts(whole: tuple[int, ...], draw: random.Random) -> list[Span]:
    """The tensor cut in a random way: along a dimension into regions of one or two slices, each into ranges."""
    regions: list[Region | None] = [None]
    if whole and draw.random() < 0.7:
        dim = draw.randrange(len(whole))
        half = whole[dim] // 2
        regions = [Region(dim, ((0, half),)), Region(dim, ((half, whole[dim] - half),))]
        if half >= 2:  # as two fused matrices are cut: a part of each
            quarter = half // 2
            first, second = (
                ((0, quarter), (half, quarter)),
                ((quarter, half - quarter), (half + quarter, whole[dim] - half - quarter)),
            )
            regions = [Region(dim, first), Region(dim, second)]
    spans = []
    for region in regions:
        total = math.prod((region.shape(whole) if region else whole) or (1,))
        edges = sorted({0, total, *(draw.randint(0, total) for _ in range(draw.randint(0, 3)))})
        spans += [Span(whole, region, a, b - a) for a, b in itertools.pairwise(edges)]
    return spans


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("seed", range(30))
def test_whatever_cut_it_every_number_arrives_once_and_at_its_place(name: str, seed: int) -> None:
    draw, whole = random.Random(f"{name}{seed}"), WHOLE[name]
    tensor = np.arange(math.prod(whole)).reshape(whole)
    sources = cuts(whole, draw)
    for target in cuts(whole, draw):
        out = np.full(target.length, -1)
        for source in sources:
            stored = numbers(source, tensor)
            for mine, to, other, box in meeting(target, source):
                run = out[mine.at : mine.at + math.prod(mine.shape)].reshape(mine.shape)
                place = tuple(slice(a, a + n) for a, n in to)
                assert (run[place] == -1).all()
                held = stored[other.at : other.at + math.prod(other.shape)].reshape(other.shape)
                run[place] = held[tuple(slice(a, a + n) for a, n in box)]
        assert out.tolist() == numbers(target, tensor).tolist()


def test_regions_make_up_a_tensor_only_without_gap_and_overlap() -> None:
    assert tiles([Region(0, ((0, 2), (4, 2))), Region(0, ((2, 2), (6, 2)))], (8, 3))
    assert not tiles([Region(0, ((0, 4),)), Region(0, ((3, 5),))], (8, 3))
    assert not tiles([Region(0, ((0, 4),)), Region(0, ((5, 3),))], (8, 3))
    assert not tiles([Region(0, ((0, 4),))], (8, 3))
    assert not tiles([Region(0, ((0, 8),)), Region(1, ((0, 3),))], (8, 3))
