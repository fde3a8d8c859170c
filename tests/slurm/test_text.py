"""Slurm's spellings of times, durations, states and nothing."""

import os
import time

import pytest

from hpcft.slurm.states import State
from hpcft.slurm.text import minutes, moment, number, pairs, word


@pytest.mark.parametrize("text", ["None", "N/A", "Unknown", "(null)", "UNLIMITED", "INVALID", "", None])
def test_every_word_for_nothing_is_none(text: str | None) -> None:
    assert (word(text), moment(text), minutes(text), number(text)) == (None, None, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("10:00", 10),
        ("00:30", 1),
        ("01:30:00", 90),
        ("01:30:01", 91),
        ("1-00:00:00", 1440),
        ("2-12", 3600),
        ("1-00:30", 1470),
        ("half an hour", None),
    ],
)
def test_limits_are_read_in_all_of_slurms_forms(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


def test_a_time_is_utc_wherever_the_machine_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert moment("1970-01-02T00:00:00") == 86400.0
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "TZ" not in os.environ or os.environ["TZ"] != "America/New_York"


def test_the_first_of_two_equal_keys_counts() -> None:
    assert pairs("JobState=RUNNING Comment=x JobState=FAILED") == {"JobState": "RUNNING", "Comment": "x"}


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("RUNNING", State.RUNNING),
        ("CANCELLED by 0", State.CANCELLED),
        ("CANCELLED+", State.CANCELLED),
        ("OUT_OF_ME+", State.OUT_OF_MEMORY),
        ("COMPLETED,COMPLETING", State.COMPLETING),
        ("RUNNING+COMPLETING", State.COMPLETING),
        ("CG", State.COMPLETING),
        ("  TIMEOUT  ", State.TIMEOUT),
        ("NODE_FAIL", State.NODE_FAIL),
        ("COMPLET", State.UNKNOWN),
        ("SOMETHING_NEW", State.UNKNOWN),
        ("", State.UNKNOWN),
    ],
)
def test_states_are_known_truncated_abbreviated_or_with_words_after_them(text: str, state: State) -> None:
    assert State.parse(text) is state


def test_every_state_is_alive_finished_or_unknown() -> None:
    assert [state for state in State if state.alive == state.finished] == [State.UNKNOWN]
    assert all(state.alive for state in State if state.waiting)
