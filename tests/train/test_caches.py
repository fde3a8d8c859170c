"""Folders of compiled programs: made private, and never another user's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcft.train.caches import VARIABLES, keep_to_ourselves


def test_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    environ = {name: str(tmp_path / "hpcft-7" / name) for name in VARIABLES}
    named = dict(environ)
    keep_to_ourselves(environ)
    keep_to_ourselves(environ)
    assert environ == named
    assert [stat.S_IMODE(os.stat(folder).st_mode) for folder in named.values()] == [0o700, 0o700]


def test_nothing_is_made_where_nothing_is_named() -> None:
    environ: dict[str, str] = {}
    keep_to_ourselves(environ)
    assert environ == {}


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    environ = {VARIABLES[0]: str(tmp_path / "open")}
    keep_to_ourselves(environ)
    assert environ[VARIABLES[0]] != str(tmp_path / "open")
    assert stat.S_IMODE(os.stat(environ[VARIABLES[0]]).st_mode) == 0o700
    assert "open is not this user's alone" in capsys.readouterr().err
    Path(environ[VARIABLES[0]]).rmdir()


@pytest.mark.parametrize("kind", ["another's folder", "a link", "a file"])
def test_neither_is_what_somebody_else_has_put_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "inductor"
    if kind == "a link":
        folder.symlink_to(tmp_path)
    elif kind == "a file":
        folder.touch()
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    environ = {VARIABLES[1]: str(folder)}
    keep_to_ourselves(environ)
    assert environ[VARIABLES[1]] != str(folder)
    Path(environ[VARIABLES[1]]).rmdir()
