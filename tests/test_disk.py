"""Text that replaces another: whole, or not at all, and nothing is left beside it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from hpcft import disk


def test_text_that_finds_no_room_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "latest"
    disk.replace(file, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            disk.replace(file, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value.filename).startswith(str(tmp_path))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("latest", "old")]
