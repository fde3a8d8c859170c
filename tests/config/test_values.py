"""Durations, names and words: what they accept, and what can never reach a script."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from hpcft.clock import clock
from hpcft.config.fields import SBATCH_OPTION, Features, Line, Minutes, Name, Word, minutes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (90, 90),
        ("90", 90),
        (" 90 ", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("01:30:01", 91),
        ("2-0", 2880),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("2-00:00:00", 2880),
        ("0-00:00:01", 1),
        ("1h30m", 90),
        ("1H", 60),
        ("2d", 2880),
        ("1d2h3m", 1563),
        ("45m", 45),
    ],
)
def test_a_duration_is_read_as_slurm_reads_it(text: object, expected: int) -> None:
    assert TypeAdapter(Minutes).validate_python(text) == expected


@pytest.mark.parametrize("text", ["", " ", "soon", "1:2:3:4", "-5", "0", 0, "1.5h", "1h 30m", "4:00:00 ", "30s", "²"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    adapter = TypeAdapter(Minutes)
    if text == "4:00:00 ":
        assert adapter.validate_python(text) == 240
        return
    with pytest.raises(ValidationError):
        adapter.validate_python(text)


@pytest.mark.parametrize("total", [*range(1, 3000, 7), 1439, 1440, 1441, 100_000])
def test_a_clock_is_read_back_as_the_minutes_it_shows(total: int) -> None:
    assert minutes(clock(total)) == total


HOSTILE = [
    "a\nb",
    "a\n",
    "\na",
    "a b",
    "a;b",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "a\\b",
    "a\x00b",
    "a\x1b[0m",
    "../a",
    "-a",
    "",
]


@pytest.mark.parametrize(
    ("minutes", "text"), [(1, "00:01:00"), (90, "01:30:00"), (1440, "1-00:00:00"), (2000, "1-09:20:00")]
)
def test_time_is_written_as_slurm_writes_it(minutes: int, text: str) -> None:
    assert clock(minutes) == text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", [Name, Word, Features])
def test_a_name_that_could_end_a_line_or_run_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(text)


@pytest.mark.parametrize("text", ["a100&hbm80g", "[rack1|rack2]", "(a|b)&c", "gpu*2", "h100"])
def test_features_may_be_joined(text: str) -> None:
    assert TypeAdapter(Features).validate_python(text) == text


@pytest.mark.parametrize("text", ["gpu", "gpu,scavenge", "project_465000000", "my-acct", "480G", "name=value", "a@b.c"])
def test_words_that_sites_use_are_accepted(text: str) -> None:
    assert TypeAdapter(Word).validate_python(text) == text


@pytest.mark.parametrize("text", ["two\nlines", "tab\there", "nul\x00", "esc\x1b", "del\x7f"])
def test_a_line_is_one_line_without_control_characters(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Line).validate_python(text)


@pytest.mark.parametrize("text", ["a path/with 'quotes' and spaces.jsonl", "Grüße/世界.jsonl", "$SCRATCH/x", "#5"])
def test_a_line_may_hold_what_paths_hold(text: str) -> None:
    assert TypeAdapter(Line).validate_python(text) == text


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("--mail-type=END", True),
        ("--hint=nomultithread", True),
        ("--mail-user=a@b.c", True),
        ("-p gpu", False),
        ("--wrap=a b", False),
        ("--comment=$(id)", False),
        ("--x\n--y", False),
        ("mail", False),
    ],
)
def test_a_further_sbatch_option_is_one_word(text: str, good: bool) -> None:
    assert bool(re.search(SBATCH_OPTION, text)) is good
