"""Settings of another tool: a JSON file, JSON on the command line or a map in the run's YAML; each key has a place."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hpcft.config.source import DEEPEST, Given, is_file, plain, spoken
from hpcft.errors import Problem, near, printable, refuse

LARGEST = 1_000_000  # bytes: a dataset named by mistake is not read into memory


@dataclass(frozen=True)
class Settings:
    """name: what to quote them by; origin: where they were named; text: the JSON, "" where they stand in YAML."""

    tree: Mapping[str, Any]
    name: str
    origin: str
    text: str = ""

    def where(self, *keys: str) -> str:
        """``file:line`` of a key inside the others, or of what named the settings where they are not a file."""
        if not self.text or self.name == self.origin:
            return self.origin
        at = 0
        for key in keys:
            found = re.compile(rf'"{re.escape(key)}"\s*:').search(self.text, at)
            at = found.start() if found else at
        return f"{self.name}:{self.text.count(chr(10), 0, at) + 1}"

    def unknown(self, key: str, known: Collection[str], *above: str) -> Problem:
        """The complaint about a key that nobody knows."""
        guess = near(key, known)
        hint = f"did you mean {guess}?" if guess else "remove it, or check its name in the tool's documentation"
        what = f"{'.'.join((*above, key))}: no such key"
        return Problem(what, self.where(*above, key), spoken(self.value(*above, key)), hint=hint)

    def value(self, *keys: str) -> Any:
        """The value of a key inside the others; None where there is none."""
        value: Any = self.tree
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def part(self, key: str) -> Mapping[str, Any]:
        """The map under ``key``, empty where there is none. Raises Refusal where something else stands there."""
        value = self.tree.get(key)
        if value is None or isinstance(value, Mapping):
            return value or {}
        raise refuse(f"{key}: must be a map of keys and values", where=self.where(key), value=spoken(value))


def read_settings(given: Given, beside: Path | None, words: Collection[str]) -> Settings:
    """What ``given`` names: a map, JSON, or a file in the current folder, else beside the run's.

    words: what may stand there instead, for the complaint. Raises Refusal.
    """
    if isinstance(given.value, Mapping):
        return Settings(given.value, given.word, given.origin)
    if not isinstance(given.value, str):
        raise refuse(f"{given.word}: needs a value", where=given.origin, value=spoken(given.value), choices=words,
                     hint="or a JSON file")  # fmt: skip
    if given.value.lstrip().startswith("{"):
        return Settings(_parsed(given.value, given.origin, given.word), given.word, given.origin)
    meant = [Path(given.value).expanduser() if given.value.startswith("~/") else Path(given.value)]
    meant += [beside.parent / given.value] if beside else []
    path = next((path for path in meant if is_file(path)), None)
    if path is None:
        raise refuse(f"{given.word}: no such file", where=given.origin, value=given.value, choices=words,
                     hint=_nearest(given.value, words))  # fmt: skip
    text = _text(path, given.word)
    return Settings(_parsed(text, str(path), given.word, in_file=True), str(path), given.origin, text)


def _nearest(value: str, words: Collection[str]) -> str:
    """The word or file that may have been meant."""
    folder = Path(value[:1000]).parent
    try:
        files = [str(folder / path.name) for path in folder.glob("*.json")]
    except (OSError, ValueError):
        files = []
    guess = near(value, words) or next(iter(difflib.get_close_matches(value[:1000], files, n=1)), "")
    return f"did you mean {guess}?" if guess else "a JSON file that is there" + (", or a word" if words else "")


def _text(path: Path, word: str) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise refuse(f"{word}: too long for a file of settings", where=str(path), hint=f"at most {LARGEST:,} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise refuse(f"{word}: not UTF-8 text", where=f"{path}:{line}", hint="save the file as UTF-8") from error
    except OSError as error:
        raise refuse(f"{word}: cannot be read: {error.strerror}", where=str(path)) from error


def _parsed(text: str, shown: str, word: str, in_file: bool = False) -> Mapping[str, Any]:
    """The text's map. Raises Refusal with the line, also for numbers that JSON does not have and for a key twice."""
    try:
        tree = json.loads(text, parse_constant=_no_number, parse_float=_number, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()
        where = f"{shown}:{error.lineno}" if in_file else shown
        raise refuse(f"{word}: not valid JSON: {error.msg}", where=where, value=printable(line),
                     hint="comments and a comma after the last value are not JSON") from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise refuse(f"{word}: not valid JSON: {printable(str(error))}", where=shown) from error
    if not isinstance(tree, Mapping):
        raise refuse(f"{word}: must be a map of keys and values", where=shown, value=printable(spoken(tree)))
    plain(tree, shown, -DEEPEST)  # raises where it is nested twice as deep as any run
    return tree


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _number(text: str) -> float:
    return float(text) if abs(float(text)) != float("inf") else _no_number(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for key in tree if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice} is given twice")
    return tree
