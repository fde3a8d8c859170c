"""What hpcft says when something is wrong: what, where, the value, the valid choices, a hint.

Every refusal that a person can cause is a ``Refusal`` made of ``Problem``s; the command line prints all of
them at once and exits with code 2. A programming mistake stays an ordinary exception with its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

EXIT_REFUSED = 2
LONGEST = 2000  # characters of one line of a complaint


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    what: the sentence, with the key in it, for example ``parallel.tp: 3 does not divide the 8 GPUs of a node``.
    where: ``file:line`` or the command-line word it came from.
    value: what was given, as the person wrote it.
    choices: what would have been valid.
    hint: the next thing to type.
    """

    what: str
    where: str = ""
    value: str = ""
    choices: tuple[str, ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        # Names of keys and files are a person's words too: a terminal escape in one must not run.
        lines = [printable(f"{self.where}: {self.what}" if self.where else self.what, LONGEST)]
        if self.value:
            lines.append(f"  value: {printable(self.value)}")
        if self.choices:
            lines.append(f"  valid: {printable(', '.join(self.choices), LONGEST)}")
        if self.hint:
            lines.append(f"  hint: {printable(self.hint, LONGEST)}")
        return "\n".join(lines)


class Refusal(Exception):
    """Input that cannot be used; carries every problem found, not only the first."""

    exit_code = EXIT_REFUSED

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[Refusal], tuple[tuple[Problem, ...]]]:
        """Raised in a worker process, it arrives with its problems and not as one text."""
        return type(self), (self.problems,)

    @property
    def report(self) -> str:
        """What a command prints on stderr before it exits with ``exit_code``."""
        return "\n".join(f"Error: {problem}" for problem in self.problems)


def refuse(
    what: str, *, where: str = "", value: object = "", choices: Iterable[object] = (), hint: str = ""
) -> Refusal:
    """A refusal of one problem, ready to be raised."""
    return Refusal(Problem(what, where, str(value), tuple(str(choice) for choice in choices), hint))


# What is wrong with a disk and not with hpcft → what to do. EFBIG is what a process over its limit is told.
_STORAGE = {
    errno.ENOSPC: "the disk is full: make room (`df -h`, `df -i`)",
    errno.EDQUOT: "your quota is used up: make room (`quota -s`, or your site's command)",
    errno.EFBIG: "files may not grow so large here: `ulimit -f`",
    errno.EROFS: "nothing can be written there now; ask the site",
    errno.EIO: "the disk or its file server fails; ask the site",
    errno.ESTALE: "the file server has lost the file for this machine; try again, or ask the site",
    errno.EACCES: "it belongs to somebody else, or its folder is closed to you",
    errno.EPERM: "it belongs to somebody else, or its folder is closed to you",
}


def storage(error: OSError) -> Refusal | None:
    """What to say of an error that a disk makes; None of any other, which is a mistake of ours."""
    if error.errno not in _STORAGE:
        return None
    return refuse(error.strerror or str(error), where=str(error.filename or ""), hint=_STORAGE[error.errno])


def count(number: int | float, thing: str) -> str:
    """``1 node``, ``2 nodes``, ``1,500 windows``."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{shown} {thing}{'' if number == 1 else 's'}"


def near(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word nearest to ``word``, or an empty string when none is as near as ``cutoff`` (0 to 1).

    Where none is, a word in capitals is looked for in small letters.
    """
    words = list(known)
    for spelt in (word[:100], word[:100].lower()):
        if matches := difflib.get_close_matches(spelt, words, n=1, cutoff=cutoff):
            return matches[0]
    return ""


def near_file(name: str, there: Iterable[str]) -> str:
    """The file nearest to ``name`` by what stands before the extensions, which alone make no two names alike."""
    stems = {PurePath(other.removesuffix(".gz")).stem: other for other in sorted(there, reverse=True)}
    found = near(PurePath(name.removesuffix(".gz")).stem, stems)
    return stems[found] if found else ""


def printable(text: str, limit: int = 200) -> str:
    """``text`` on one line without control characters (a terminal escape in a name must not run), cut at ``limit``."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
