"""Where a model's first weights come from, read part by part so that no rank ever holds the whole model in host memory.

``Files``: the model's own safetensors, mapped into memory; a node reads each byte once, its ranks share the pages.
``FirstRank``: rank 0 builds the whole model on the CPU and sends it parameter by parameter; for random weights, for
adapters that start from the weights they sit on, and for files whose names are not the model's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
import torch.distributed as dist
from torch import nn

from hpcft.run.regions import Span, meeting
from hpcft.train.reader import within
from hpcft.train.world import World

MARKED = 512  # bytes at a tensor's beginning that tell it from another: trained further, it differs everywhere
CHUNK = 2**25  # numbers read at a time: what a rank holds of the files in memory of its own


class Source(Protocol):
    """Reads one part of one parameter."""

    def read(self, name: str, span: Span, out: torch.Tensor) -> None:
        """Fill ``out`` [span.length], of any type and device. All ranks call it, for the same names in turn."""

    def mark(self) -> str:
        """What tells these weights from others, without reading them all; the same on ranks that read the same."""

    def close(self) -> None:
        """Everything is read: let go of what is held for it."""


class Files:
    """Weights by their names in safetensors files. initial: those that are not there, adapters and a new head."""

    def __init__(self, files: Mapping[str, Path], initial: dict[str, torch.Tensor]) -> None:
        self.files, self.initial = files, initial
        self._open: dict[Path, Any] = {}

    def read(self, name: str, span: Span, out: torch.Tensor) -> None:
        for known in (name, file_name(name)):
            if known in self.initial:
                _copy(self.initial[known], span, out)
                return
        file = self._file(self.files[file_name(name)])
        if not span.whole:  # one number, without a dimension that a slice could be of
            out.copy_(file.get_tensor(file_name(name)).view(-1)[span.offset : span.offset + span.length])
            return
        stored = file.get_slice(file_name(name))
        for patch in span.patches():
            run = within(out[patch.at : patch.at + math.prod(patch.shape)].view(patch.shape), patch.inner)
            (first, rows), *rest = patch.where
            step = max(1, CHUNK // math.prod(length for _, length in rest))
            for row in range(0, rows, step):
                n = min(step, rows - row)
                box = (slice(first + row, first + row + n), *(slice(start, start + length) for start, length in rest))
                run[row : row + n].copy_(stored[box])

    def mark(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                text = file.read(int.from_bytes(file.read(8), "little"))
                digest.update(text)
                begin = file.tell()
                for name, tensor in sorted(json.loads(text).items()):
                    if name != "__metadata__":
                        file.seek(begin + tensor["data_offsets"][0])
                        digest.update(file.read(MARKED))
        return digest.hexdigest()

    def close(self) -> None:
        self.initial, self._open = {}, {}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safetensors.safe_open(path, framework="pt")
        return self._open[path]


class FirstRank:
    """Weights of a model that rank 0 holds. build: makes it there, on the CPU; other ranks never call it."""

    def __init__(self, world: World, build: Callable[[], nn.Module]) -> None:
        self.world = world
        self.held: dict[str, torch.Tensor] = {}
        if world.first:
            model = build()
            self.held = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}

    def read(self, name: str, span: Span, out: torch.Tensor) -> None:
        whole = self.held[name] if self.world.first else torch.empty(span.whole, dtype=out.dtype)
        if self.world.control is not None:
            whole = whole.to(out.dtype).contiguous()
            dist.broadcast(whole, 0, group=self.world.control)
        _copy(whole, span, out)

    def mark(self) -> str:
        return "rank 0"

    def close(self) -> None:
        self.held = {}


def file_name(name: str) -> str:
    """The name that a parameter or buffer of a peft model has in the files of its base."""
    return (
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        .replace(".original_module.", ".")
    )


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor name → file, of a model folder; empty where it has no safetensors."""
    with suppress(OSError, ValueError):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        return {name: folder / file for name, file in index["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safetensors.safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def fits(files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Do the files have every one of these parameters, under its own name and in its own shape?"""
    opened: dict[Path, Any] = {}
    for name, shape in shapes.items():
        path = files.get(file_name(name))
        if path is None or not path.is_file():
            return False
        file = opened.setdefault(path, safetensors.safe_open(path, framework="pt"))
        if tuple(file.get_slice(file_name(name)).get_shape()) != shape:
            return False
    return True


def _copy(whole: torch.Tensor, span: Span, out: torch.Tensor) -> None:
    shape = tuple(whole.shape)
    for mine, to, other, box in meeting(span, Span(shape, None, 0, whole.numel())):
        run = out[mine.at : mine.at + math.prod(mine.shape)].view(mine.shape)
        within(run, to).copy_(within(whole.view(other.shape), box))
