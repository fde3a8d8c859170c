"""YAML with line numbers: what was said, and where.

Every leaf keeps its origin (``run.yaml:14``, ``command line``), so that each later complaint can point at it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import Problem, Refusal, printable, refuse

COMMAND_LINE = "command line"
DEEPEST = 5  # lists in maps in lists …: a run needs three


# What YAML's reader says → what to do about it
_YAML_HINTS = {
    "duplicate": "a key may stand once in its section",
    "mapping values": 'the keys of a section are indented alike; a value that holds ": " wants quotes',
    "'\\t'": "lines are indented with spaces, not with tabs",
}


@dataclass(frozen=True)
class Given:
    """One value that somebody gave. origin: ``file:line`` or ``command line``; word: the key as they spelt it."""

    value: Any
    origin: str
    word: str


def exists(path: str | Path) -> bool:
    """Whether something is there; a name that no file could have is not (pathlib raises at some of those)."""
    return os.path.exists(path)


def is_file(path: str | Path) -> bool:
    """Whether a file is there, in the same way."""
    return os.path.isfile(path)


def spoken(value: Any) -> str:
    """A value as a person would write it: ``true``, not ``True``; nothing for null."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def read_yaml(path: Path) -> tuple[Any, str]:
    """The file's value with line numbers, and the name to quote it by. Raises Refusal with file:line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    shown = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise refuse("not UTF-8 text", where=f"{shown}:{line}", hint="save the file as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        why = getattr(error, "strerror", None) or str(error)
        raise refuse(f"cannot be read: {why}", where=shown, hint="give the path of a YAML file") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor may be given anew, as YAML allows
            tree = YAML(typ="rt", pure=True).load(text)
            circle = _circle(YAML(pure=True).compose(text)) if "*" in text else 0
        if circle:
            raise refuse("an anchor stands inside of itself", where=f"{shown}:{circle}", hint="write its value out")
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = next((hint for word, hint in _YAML_HINTS.items() if word in str(error.problem)), "")
        raise refuse(
            f"not valid YAML: {error.problem or error.context}",
            where=f"{shown}:{mark.line + 1}" if mark else shown,
            value=printable("".join(text.split("\n")[mark.line : mark.line + 1])[:80]) if mark else "",
            hint=hint,
        ) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: a character that may not stand in it, {printable(repr(text[error.position])[1:-1])}"
        raise refuse(what, where=f"{shown}:{line}", hint="remove it") from error
    except RecursionError as error:
        raise refuse("not valid YAML: nested too deep", where=shown) from error
    except (YAMLError, ValueError) as error:
        raise refuse(f"not valid YAML: {printable(str(error))}", where=shown) from error
    if not isinstance(tree, Mapping):
        raise refuse("holds no keys", where=shown, hint="hpcft init writes a starter with every key explained")
    return tree, shown


def _circle(node: Any, above: tuple[int, ...] = (), done: set[int] | None = None) -> int:
    """The line of an anchor that is used inside of itself, which YAML's reader takes for null; 0 where none is."""
    done = set() if done is None else done
    if id(node) in above:
        return int(node.start_mark.line) + 1
    if id(node) in done or not isinstance(getattr(node, "value", None), list):
        return 0
    inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    found = next((line for part in inner if (line := _circle(part, (*above, id(node)), done))), 0)
    done.add(id(node))
    return found


def line_of(tree: Any, key: Any, shown: str) -> str:
    """``file:line`` of ``key`` in a mapping that read_yaml gave."""
    positions = getattr(getattr(tree, "lc", None), "data", None) or {}
    return f"{shown}:{positions[key][0] + 1}" if key in positions else shown


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """YAML's value as plain Python. Raises Refusal at a YAML tag, which could stand for any object."""
    if depth > DEEPEST:  # an anchor may even stand inside itself
        raise refuse(f"nested deeper than {DEEPEST} levels", where=where)
    if isinstance(value, (Mapping, list, tuple)) and (tag := _tag(value)):
        raise refuse("YAML tags are not read here", where=where, value=tag, hint="remove the tag")
    if isinstance(value, Mapping):
        return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where, depth + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise refuse("YAML tags and dates are not read here", where=where, value=value, hint="put the value in quotes")


def _tag(value: Any) -> str:
    return str(getattr(getattr(value, "tag", None), "value", None) or "")


def _is_map(value: Any) -> bool:
    return (value is None or isinstance(value, Mapping)) and not _tag(value)


def flatten(
    tree: Any, shown: str, section_of: Callable[[str, Mapping[Any, Any]], str | None], problems: list[Problem]
) -> dict[str, Given]:
    """Leaves of a run file by their own spelling. A leaf may stand in its section or on top.

    section_of: the section that a key with such a map behind it is or was meant to be, "" for none of ours, None for a
    leaf. One that is misspelt is complained about and read. A scalar under a section's name is the leaf of that name
    (``model: Qwen/…``).
    """
    leaves: dict[str, Given] = {}

    def add(holder: Any, key: str, value: Any, word: str) -> None:
        where = line_of(holder, key, shown)
        if key in leaves:
            problems.append(
                Problem(f"{word}: given twice, also at {leaves[key].origin}", where, hint="remove one of them")
            )
            return
        try:
            leaves[key] = Given(plain(value, where), where, word)
        except Refusal as refusal:
            problems.extend(refusal.problems)

    for key, value in tree.items():
        name = str(key)
        section = section_of(name, value or {}) if _is_map(value) else None
        if section is not None:
            if section != name:
                hint = f"did you mean the section {section}?" if section else "its keys may as well stand on top"
                problems.append(Problem(f"{name}: no such section", line_of(tree, key, shown), hint=hint))
            for inner, item in (value or {}).items():
                add(value, inner, item, f"{name}.{inner}")
        else:
            add(tree, name, value, name)
    return leaves
