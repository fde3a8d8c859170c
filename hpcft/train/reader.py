"""Reading a checkpoint's tensors: any range of any of them, whatever layout wrote it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors
import torch

from hpcft.run import manifest as manifests
from hpcft.run.manifest import Manifest


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

    def read(self, name: str, part: str, offset: int, length: int) -> torch.Tensor:
        """float32 [length] on the CPU: numbers ``offset`` … ``offset + length`` of the flattened tensor.

        part: master, exp_avg or exp_avg_sq. Raises KeyError for an unknown name, IndexError outside the tensor.
        """
        if offset < 0 or offset + length > math.prod(self.manifest.tensors[name].shape):
            raise IndexError(f"{name}: numbers {offset} … {offset + length} of {self.manifest.tensors[name].shape}")
        out = torch.empty(length, dtype=torch.float32)
        for piece in self.manifest.tensors[name].pieces:
            first, last = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if piece.part == part and first < last:
                stored = self._file(piece.file).get_slice(piece.key)
                out[first - offset : last - offset] = stored[first - piece.offset : last - piece.offset]
        return out

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safetensors.safe_open(self.folder / name, framework="pt")
        return self._files[name]
