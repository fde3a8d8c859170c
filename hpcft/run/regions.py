"""Parts of tensors, as integers: what a rank holds of one, and where two such parts meet.

A rank may hold a region (slices of one dimension laid side by side, as tensor parallelism cuts it) and of that region a
range of its flattened numbers (as FSDP, ZeRO and evenly spread saving cut it). Both together are a ``Span``. Any span
of the same tensor can be filled from any others, which is why every layout resumes into every other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (start, length) in each dimension


@dataclass(frozen=True)
class Region:
    """``slices``, as (start, length), of dimension ``dim``; the other dimensions whole."""

    dim: int
    slices: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Extent along ``dim``."""
        return sum(length for _, length in self.slices)

    def shape(self, whole: Shape) -> Shape:
        """The shape of the region of a tensor of shape ``whole``."""
        return tuple(self.length if d == self.dim else n for d, n in enumerate(whole))


@dataclass(frozen=True)
class Span:
    """``length`` flattened numbers from ``offset`` on, of ``region`` (None: all) of a tensor of shape ``whole``."""

    whole: Shape
    region: Region | None
    offset: int
    length: int

    @property
    def shape(self) -> Shape:
        """The shape of what the range is a range of; a scalar counts as one number."""
        return (self.region.shape(self.whole) if self.region else self.whole) or (1,)

    def patches(self) -> Iterator[Patch]:
        """The span as boxes of the tensor, in order."""
        at = 0
        for box in _boxes(self.shape, self.offset, self.length):
            shape = tuple(length for _, length in box)
            for inner, where in _placed(box, self.region):
                yield Patch(at, shape, inner, where)
            at += math.prod(shape)


@dataclass(frozen=True)
class Patch:
    """A box of a span. at, shape: the run of the span's numbers that it is in, from ``at`` on, read as ``shape``.

    inner: the box inside that run. where: the same box inside the whole tensor.
    """

    at: int
    shape: Shape
    inner: Box
    where: Box

    def cut(self, common: Box) -> Box:
        """A box of the tensor, inside ``where``, as a box of the run."""
        return tuple(
            (start - place + inside, length)
            for (start, length), (place, _), (inside, _) in zip(common, self.where, self.inner, strict=True)
        )


def meeting(target: Span, source: Span) -> Iterator[tuple[Patch, Box, Patch, Box]]:
    """Where two spans of one tensor hold the same numbers: patch and box in its run, for both."""
    theirs = list(source.patches())
    for mine in target.patches():
        for other in theirs:
            if (common := _common(mine.where, other.where)) is not None:
                yield mine, mine.cut(common), other, other.cut(common)


def tiles(regions: Sequence[Region], whole: Shape) -> bool:
    """Do the regions cover the tensor exactly once, all along the same dimension?"""
    if len({region.dim for region in regions}) != 1:
        return False
    at = 0
    for start, length in sorted(part for region in regions for part in region.slices if part[1]):
        if start != at:
            return False
        at += length
    return at == whole[regions[0].dim]


def _boxes(shape: Shape, offset: int, length: int) -> Iterator[Box]:
    """A flat range as boxes that are each contiguous: the end of a row, whole rows, the beginning of a row."""
    if length <= 0:
        return
    if len(shape) == 1:
        yield ((offset, length),)
        return
    inner = math.prod(shape[1:])
    row, skipped = divmod(offset, inner)
    if skipped:
        first = min(length, inner - skipped)
        yield from (((row, 1), *box) for box in _boxes(shape[1:], skipped, first))
        row, length = row + 1, length - first
    rows, rest = divmod(length, inner)
    if rows:
        yield ((row, rows), *((0, n) for n in shape[1:]))
    yield from (((row + rows, 1), *box) for box in _boxes(shape[1:], 0, rest))


def _placed(box: Box, region: Region | None) -> Iterator[tuple[Box, Box]]:
    """A box of a region → (inside the box, inside the tensor), once for each slice that it touches."""
    zero = tuple((0, length) for _, length in box)
    if region is None:
        yield zero, box
        return
    dim, at = region.dim, 0
    start, end = box[dim][0], sum(box[dim])
    for place, length in region.slices:
        first, last = max(start, at), min(end, at + length)
        if first < last:
            n = last - first
            inner, where = list(zero), list(box)
            inner[dim], where[dim] = (first - start, n), (place + first - at, n)
            yield tuple(inner), tuple(where)
        at += length


def _common(one: Box, other: Box) -> Box | None:
    common = []
    for (a, n), (b, m) in zip(one, other, strict=True):
        first, last = max(a, b), min(a + n, b + m)
        if first >= last:
            return None
        common.append((first, last - first))
    return tuple(common)
