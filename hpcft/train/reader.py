"""Reading a checkpoint's tensors: any range of any of them, whatever layout wrote it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors
import torch

from hpcft.run import manifest as manifests
from hpcft.run.manifest import Manifest, Piece
from hpcft.run.regions import Box, Region, Span, meeting


class Reader:
    """Named float32 ranges of a checkpoint, whatever layout wrote it. Verified before, by whoever chose it."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or manifests.verify(folder)
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()

    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: tensor.shape for name, tensor in self.manifest.tensors.items()}

    def read(self, name: str, part: str, offset: int, length: int, region: Region | None = None) -> torch.Tensor:
        """float32 [length] on the CPU: numbers ``offset`` … ``offset + length`` of the flattened tensor, or region.

        part: master, exp_avg or exp_avg_sq. Raises KeyError for an unknown name, IndexError outside the tensor.
        """
        tensor = self.manifest.tensors[name]
        wanted = Span(tensor.shape, region, offset, length)
        if offset < 0 or offset + length > math.prod(wanted.shape):
            raise IndexError(f"{name}: numbers {offset} … {offset + length} of {wanted.shape}")
        out = torch.empty(length, dtype=torch.float32)
        for piece in tensor.pieces:
            if piece.part == part and piece.region == region:
                self._copy_range(piece, offset, out)
            elif piece.part == part:
                self._copy_boxes(piece, wanted, out)
        return out

    def _copy_range(self, piece: Piece, offset: int, out: torch.Tensor) -> None:
        """Both are ranges of the same numbers."""
        first, last = max(offset, piece.offset), min(offset + len(out), piece.offset + piece.length)
        if first < last:
            stored = self._file(piece.file).get_slice(piece.key)
            out[first - offset : last - offset] = stored[first - piece.offset : last - piece.offset]

    def _copy_boxes(self, piece: Piece, wanted: Span, out: torch.Tensor) -> None:
        """They are cut differently; of a box, the rows that are wanted are read."""
        stored = self._file(piece.file).get_slice(piece.key)
        for mine, to, other, source in meeting(wanted, piece.span(wanted.whole)):
            row, rows = source[0]
            inner = math.prod(other.shape[1:])
            numbers = stored[other.at + row * inner : other.at + (row + rows) * inner]
            block = within(numbers.view(rows, *other.shape[1:]), ((0, rows), *source[1:]))
            run = out[mine.at : mine.at + math.prod(mine.shape)].view(mine.shape)
            within(run, to).copy_(block)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safetensors.safe_open(self.folder / name, framework="pt")
        return self._files[name]


def within(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view of a box of ``tensor``."""
    for dim, (start, length) in enumerate(box):
        tensor = tensor.narrow(dim, start, length)
    return tensor
