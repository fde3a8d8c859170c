"""How the batch shell's helpers end, which the script acts upon."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hpcft.errors import refuse
from hpcft.launch.entry import EXIT_OUT_OF_REACH, run
from hpcft.run.folder import make_folder


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ESTALE, EXIT_OUT_OF_REACH), (errno.EIO, EXIT_OUT_OF_REACH), (errno.ENOSPC, 2), (errno.EDQUOT, 2)],
)
def test_files_that_another_node_may_reach_have_a_code_of_their_own_where_one_is_given(number: int, code: int) -> None:
    def fails() -> int:
        raise OSError(number, "no")

    assert run(fails, out_of_reach=EXIT_OUT_OF_REACH) == code
    assert run(fails) == 2


def test_a_refusal_that_came_of_such_an_error_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        make_folder(Path("/proc/no/such"))
        return 0

    def refuses() -> int:
        raise refuse("another plan is there")

    assert run(fails, out_of_reach=EXIT_OUT_OF_REACH) == EXIT_OUT_OF_REACH
    assert run(refuses, out_of_reach=EXIT_OUT_OF_REACH) == 2
    assert "the run folder cannot be made" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def fails() -> int:
        raise OSError(errno.ENOTTY, "no")

    with pytest.raises(OSError, match="no"):
        run(fails, out_of_reach=EXIT_OUT_OF_REACH)
