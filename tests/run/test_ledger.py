"""The ledger: what was written is read, in order, whatever was cut short in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def test_the_writers_events_are_merged_by_time(paths: RunPaths) -> None:
    environ = {"HPCFT_ATTEMPT": "2", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    first, second = Ledger(paths, "batch", environ), Ledger(paths, "rank-0000", environ)
    for writer, event in ((first, "a"), (second, "b"), (first, "c")):
        writer.write(event, step=3)
    events = read_events(paths)
    assert [event["event"] for event in events] == ["a", "b", "c"]
    assert {(event["attempt"], event["job"], event["restart"], event["step"]) for event in events} == {(2, "7", 1, 3)}


def test_a_run_without_a_ledger_has_no_events(paths: RunPaths) -> None:
    assert read_events(paths) == []


@pytest.mark.parametrize("torn", ['{"time": 1.0, "ev', "\x00\x00\x00", "[]", '{"event": "no time"}', '"'])
def test_a_line_cut_short_is_passed_over_and_harms_no_other(paths: RunPaths, torn: str) -> None:
    ledger = Ledger(paths, "batch", {})
    ledger.write("before")
    with ledger.path.open("a") as file:
        file.write(torn)
    ledger.write("after")
    assert [event["event"] for event in read_events(paths)] == ["before", "after"]


def test_bytes_that_are_no_text_harm_no_other_line(paths: RunPaths) -> None:
    ledger = Ledger(paths, "batch", {})
    ledger.write("before")
    with ledger.path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    ledger.write("after")
    assert [event["event"] for event in read_events(paths)] == ["before", "after"]


def test_only_its_owner_reads_it(paths: RunPaths) -> None:
    Ledger(paths, "batch", {}).write("a", where=Path("/x"))
    (file,) = paths.events.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert paths.events.stat().st_mode & 0o077 == 0
    assert json.loads(file.read_text())["where"] == "/x"


def test_a_link_in_its_place_is_not_followed(paths: RunPaths, tmp_path: Path) -> None:
    ledger = Ledger(paths, "batch", {})
    paths.events.mkdir(parents=True)
    ledger.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        ledger.write("a")
    assert not (tmp_path / "elsewhere").exists()
