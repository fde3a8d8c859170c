"""A manifest finds every change of a checkpoint's files, and of itself."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.run import manifest as manifests
from hpcft.run.manifest import Broken, Manifest, Piece, Stamp, Tensor
from hpcft.run.paths import RunPaths


def written(folder: Path, step: int = 4) -> Path:
    """A checkpoint folder of two files and one tensor of ten numbers."""
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_bytes(os.urandom(200))
    pieces = tuple(
        Piece(part, file, f"{part}/w", offset, length)
        for part in manifests.PARTS
        for file, offset, length in (("a", 0, 6), ("b", 6, 4))
    )
    manifest = Manifest(
        step=step,
        plan="0123",
        facts={"train": {"seed": 1}},
        data="abcd",
        progress={"step": step},
        state={"updates": step},
        layout={"nodes": 1},
        versions={"torch": "2"},
        tensors={"w": Tensor((2, 5), pieces)},
        files={name: Stamp(200, manifests.checksum(folder / name)) for name in ("a", "b")},
    )
    (folder / manifests.FILE).write_text(manifest.to_text())
    return folder


def test_what_was_written_is_read_back_and_a_copy_elsewhere_is_as_good(tmp_path: Path) -> None:
    folder = written(tmp_path / "step-000004")
    manifest = manifests.verify(folder)
    assert (manifest.step, manifest.tensors["w"].shape, manifest.folder) == (4, (2, 5), folder)
    folder.rename(tmp_path / "elsewhere")
    assert dataclasses.replace(manifests.verify(tmp_path / "elsewhere"), folder=folder) == manifest


def test_any_changed_byte_of_any_file_is_found(tmp_path: Path) -> None:
    folder, draw = written(tmp_path / "step-000004"), random.Random(1)
    for _ in range(300):
        path = folder / draw.choice(["a", "b"])
        whole = path.read_bytes()
        at, change = draw.randrange(200), draw.randrange(1, 256)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        with pytest.raises(Broken, match=path.name):
            manifests.verify(folder)
        path.write_bytes(whole)
    manifests.verify(folder)


def test_a_changed_byte_of_the_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    folder, draw = written(tmp_path / "step-000004"), random.Random(2)
    path = folder / manifests.FILE
    whole, before, found = path.read_bytes(), manifests.read(folder), 0
    for _ in range(500):
        at, change = draw.randrange(len(whole)), draw.randrange(1, 256)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        try:
            assert manifests.read(folder) == before
        except Broken:
            found += 1
    assert found > 300


def test_a_manifest_torn_at_any_place_is_broken(tmp_path: Path) -> None:
    path = written(tmp_path / "step-000004") / manifests.FILE
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Broken):
            manifests.read(path.parent)


def test_missing_short_and_linked_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "step-000004")
    content = (folder / "a").read_bytes()
    (folder / "a").write_bytes(content[:-1])
    with pytest.raises(Broken, match="199 bytes instead of 200"):
        manifests.verify(folder, deep=False)
    (folder / "a").unlink()
    with pytest.raises(Broken, match="No such file"):
        manifests.verify(folder, deep=False)
    (tmp_path / "a").write_bytes(content)
    (folder / "a").symlink_to(tmp_path / "a")
    with pytest.raises(Broken, match="plain file"):
        manifests.verify(folder)


@pytest.mark.parametrize(("offset", "length"), [(6, 3), (6, 5), (7, 4), (5, 4), (5, 5), (7, 3)])
def test_pieces_with_a_gap_or_an_overlap_are_broken(offset: int, length: int, tmp_path: Path) -> None:
    folder = written(tmp_path / "step-000004")
    manifest = manifests.read(folder)
    pieces = manifest.tensors["w"].pieces
    spoilt = tuple(dataclasses.replace(p, offset=offset, length=length) if p.file == "b" else p for p in pieces)
    text = dataclasses.replace(manifest, tensors={"w": Tensor((2, 5), spoilt)}).to_text()
    (folder / manifests.FILE).write_text(text)
    with pytest.raises(Broken, match="covered"):
        manifests.verify(folder)


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "step-000004")
    manifest = manifests.read(folder)
    (tmp_path / "x").write_bytes(b"x")
    files = {**manifest.files, "../x": Stamp(1, manifests.checksum(tmp_path / "x"))}
    (folder / manifests.FILE).write_text(dataclasses.replace(manifest, files=files).to_text())
    with pytest.raises(Broken, match="plain file of this folder"):
        manifests.verify(folder)


def test_the_newest_is_by_number_and_broken_ones_are_told(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (9, 999_999, 1_000_000):
        written(paths.checkpoint(step), step)
    written(paths.checkpoints / ".tmp-step-2000000.job-0-1", 2_000_000)
    assert [step for step, _ in manifests.folders(paths)] == [1_000_000, 999_999, 9]
    (paths.checkpoint(1_000_000) / "b").unlink()
    told: list[Broken] = []
    newest = manifests.newest_verified(paths, told.append)
    assert newest is not None
    assert newest.step == 999_999
    assert [broken.file.name for broken in told] == ["b"]


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert manifests.newest_verified(RunPaths(tmp_path)) is None


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.checkpoints.touch()  # what root may not read either
    with pytest.raises(OSError, match="Not a directory"):
        manifests.newest_verified(paths)


@pytest.mark.parametrize("text", ["", "step-000009\n", "../step-000004", "/etc", "\x00"])
def test_a_pointer_that_names_no_checkpoint_is_nothing(text: str, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    written(paths.checkpoint(4))
    paths.latest.write_text(text)
    assert manifests.pointed(paths.latest) is None
    paths.latest.write_text("step-000004\n")
    assert manifests.pointed(paths.latest) == paths.checkpoint(4)


def test_reading_manifests_loads_no_torch() -> None:
    code = "import sys, hpcft.run.manifest; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
