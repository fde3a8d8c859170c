"""What a checkpoint folder promises, and whether it keeps it. No torch: the batch shell and the login node read it too.

    checkpoints/step-000400/
        manifest.json             {"sha256": of the canonical text of "manifest", "manifest": {…}}
        state-rank-0000.safetensors  of each rank, and -01 … of 4 GiB each: pieces of named float32 tensors

None of the tensor formats checks its bytes on load, so the manifest does: every file's size and SHA-256 (which the
standard library always has), its own text, and that the pieces cover every tensor exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.run.paths import RunPaths
from hpcft.run.regions import Region, Span, tiles

SCHEMA = 1
FILE = "manifest.json"
PARTS = ("master", "exp_avg", "exp_avg_sq")
STEP_FOLDER = re.compile(r"step-(\d{6,})")


class Broken(Exception):
    """A checkpoint that cannot be trusted: which file, and why."""

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


@dataclass(frozen=True)
class Piece:
    """``length`` numbers of one part of one flattened tensor, from ``offset`` on, as tensor ``key`` of ``file``.

    region: the numbers are those of this region of the tensor, flattened; None: of all of it.
    """

    part: str
    file: str
    key: str
    offset: int
    length: int
    region: Region | None = None

    def span(self, whole: tuple[int, ...]) -> Span:
        """Which numbers of a tensor of shape ``whole`` these are."""
        return Span(whole, self.region, self.offset, self.length)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Piece:
        """A piece as JSON has it."""
        region = data.get("region")
        slices = tuple((int(start), int(length)) for start, length in region["slices"]) if region else ()
        return cls(**{**data, "region": Region(int(region["dim"]), slices) if region else None})


@dataclass(frozen=True)
class Tensor:
    """One named tensor of the global state, and where its pieces lie."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Stamp:
    """What a file must be: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description.

    progress: where the run stood (``train.progress``). facts: what a resuming run must share, by name. data: the
    content key of the prepared shards. layout: who wrote it, for people. state: loss scale and such. versions: of
    the software. ``folder`` is where it was read from and is not part of its text: a copy stays valid.
    """

    step: int
    plan: str
    facts: Mapping[str, Any]
    data: str
    progress: Mapping[str, Any]
    state: Mapping[str, Any]
    layout: Mapping[str, Any]
    versions: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Stamp]
    folder: Path = Path()

    def to_text(self) -> str:
        """The text of manifest.json."""
        body = {"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "folder"}}
        return json.dumps({"sha256": _digest(body), "manifest": body}, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path) -> Manifest:
    """The manifest of ``folder``, its own text checked, its files not yet looked at. Raises Broken."""
    path = folder / FILE
    try:
        whole = json.loads(path.read_bytes())
        body = dict(whole["manifest"])
        if _digest(body) != whole["sha256"]:
            raise Broken(path, "its text is not what was written")
        if body.pop("schema") != SCHEMA:
            raise Broken(path, f"not of schema {SCHEMA}")
        return _build(body, folder)
    except OSError as error:
        raise Broken(path, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(path, f"not a manifest: {error}") from error


def _build(body: dict[str, Any], folder: Path) -> Manifest:
    tensors = {
        name: Tensor(tuple(t["shape"]), tuple(map(Piece.from_dict, t["pieces"])))
        for name, t in body.pop("tensors").items()
    }
    files = {name: Stamp(**stamp) for name, stamp in body.pop("files").items()}
    return Manifest(**body, tensors=tensors, files=files, folder=folder)


def verify(folder: Path, deep: bool = True) -> Manifest:
    """The manifest of a checkpoint that keeps its promise. Raises Broken naming the first file that does not.

    deep: compare every byte with the checksums; otherwise only presence and size, which costs nothing.
    """
    manifest = read(folder)
    for name, tensor in manifest.tensors.items():
        _covered(manifest, name, tensor)
    for name, stamp in manifest.files.items():
        _present(folder / name, name, stamp)
    if deep:
        with ThreadPoolExecutor(min(8, len(manifest.files) or 1)) as pool:
            for name, sha256 in zip(
                manifest.files, pool.map(lambda n: checksum(folder / n), manifest.files), strict=True
            ):
                if sha256 != manifest.files[name].sha256:
                    raise Broken(folder / name, "its bytes are not what was written")
    return manifest


def _covered(manifest: Manifest, name: str, tensor: Tensor) -> None:
    """Every number of every part exactly once: each region from its first number to its last, the regions all of it."""
    for part in PARTS:
        pieces = [piece for piece in tensor.pieces if piece.part == part]
        regions = list(dict.fromkeys(piece.region for piece in pieces)) or [None]
        for region in regions:
            mine = sorted((p for p in pieces if p.region == region), key=lambda p: p.offset)
            _gapless(
                manifest, f"{name}: {part}", mine, math.prod(region.shape(tensor.shape) if region else tensor.shape)
            )
        if regions != [None] and (None in regions or not tiles([r for r in regions if r], tensor.shape)):
            raise Broken(manifest.folder / FILE, f"{name}: {part} is not covered: its regions are not the whole")


def _gapless(manifest: Manifest, what: str, pieces: list[Piece], numbers: int) -> None:
    at = 0
    for piece in pieces:
        if piece.offset != at or piece.file not in manifest.files:
            raise Broken(manifest.folder / FILE, f"{what} is not covered at {at}")
        at += piece.length
    if at != numbers:
        raise Broken(manifest.folder / FILE, f"{what} is covered up to {at} of {numbers}")


def _present(path: Path, name: str, stamp: Stamp) -> None:
    if name != Path(name).name or path.is_symlink():
        raise Broken(path, "not a plain file of this folder")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Broken(path, error.strerror or str(error)) from error
    if size != stamp.bytes:
        raise Broken(path, f"{size} bytes instead of {stamp.bytes}")


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises Broken where it cannot be read."""
    try:
        return disk.sha256(path)
    except OSError as error:
        raise Broken(path, error.strerror or str(error)) from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folders(paths: RunPaths) -> list[tuple[int, Path]]:
    """Step and folder of everything that looks like a checkpoint of this run, newest first, by number.

    Raises OSError where the folder is there and cannot be read: taken for empty, it would make a run begin again.
    """
    try:
        names = os.listdir(paths.checkpoints)
    except FileNotFoundError:
        return []
    found = [(int(match[1]), paths.checkpoints / name) for name in names if (match := STEP_FOLDER.fullmatch(name))]
    return sorted(found, reverse=True)


def verified(
    paths: RunPaths, deep: bool = True, on_broken: Callable[[Broken], None] = lambda broken: None
) -> Iterator[Manifest]:
    """The checkpoints that keep their promise, newest first; the others are told to ``on_broken``."""
    for _, folder in folders(paths):
        try:
            yield verify(folder, deep)
        except Broken as broken:
            on_broken(broken)


def newest_verified(paths: RunPaths, on_broken: Callable[[Broken], None] = lambda broken: None) -> Manifest | None:
    """The newest checkpoint whose every byte is right, None where there is none; ``latest`` is not asked."""
    return next(verified(paths, True, on_broken), None)


def pointed(pointer: Path) -> Path | None:
    """The folder that ``latest`` or ``best`` names, if it is one beside it; None otherwise."""
    try:
        name = disk.read(pointer).strip()
    except (OSError, ValueError):
        return None
    folder = pointer.parent / name
    return folder if STEP_FOLDER.fullmatch(name) and folder.is_dir() else None
