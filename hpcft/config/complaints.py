"""pydantic's complaints in our words: the key as it was spelt, its line, the value, what would have been valid."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpcft.config.run import NEEDS_A_VALUE
from hpcft.config.source import COMMAND_LINE, Given, spoken
from hpcft.errors import Problem, near

M = TypeVar("M", bound=BaseModel)
Path = tuple[str, ...]

_EXAMPLES = {
    "model": "model: Qwen/Qwen2.5-0.5B-Instruct",
    "dataset": "dataset: [train.jsonl]",
    "data": "dataset: [train.jsonl]",
}
_SENTENCES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_unicode": "is not UTF-8 text",
    "string_too_short": "is empty",
    "tuple_type": "must be a list",
    "too_short": "is empty",
    "dict_type": "must be a map of keys and values",
    "model_type": "must be a map of keys and values",
}


def validate(
    model: type[M],
    data: Any,
    places: Mapping[Path, Given],
    problems: list[Problem],
    where: str = "",
    unread: Collection[Path] = (),
) -> M | None:
    """``data`` as a ``model``; None where something is wrong, all of which is added to ``problems``.

    places: path of a key → how it was given; where: the file, for keys that are not there; unread: keys that are not
    in ``data`` because they were complained about already.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        complaints: dict[Path, list[Any]] = {}
        for detail in error.errors():  # a union complains once per member
            path = tuple(str(part) for part in detail["loc"][:2])
            if detail["type"] != "missing" or path not in unread:
                complaints.setdefault(path, []).append(detail)
        problems += [_problem(model, details, places, where) for details in complaints.values()]
        return None


def _problem(model: type[BaseModel], details: list[Any], places: Mapping[Path, Given], file: str) -> Problem:
    detail, *others = details
    path = tuple(str(part) for part in detail["loc"] if not isinstance(part, int))
    known = next((path[:n] for n in (2, 1) if path[:n] in places), None)
    given = places[known] if known else None
    where, word = (given.origin, given.word) if given else (file, ".".join(path[:2]))
    if detail["type"] == "missing":
        return Problem(f"{'.'.join(path)}: missing", where, hint=f"add {_EXAMPLES.get(path[-1], path[-1] + ': …')}")
    if detail["type"] == "extra_forbidden":
        guess = near(path[-1], model.model_fields)
        return Problem(f"{word}: no such key", where, hint=f"did you mean {guess}?" if guess else "")
    value = "" if detail["input"] is True else spoken(detail["input"])
    choices = tuple(choice for one in details for choice in _choices(one)) if _choices(detail) else ()
    guess = near(value, choices)
    hint = f"did you mean {guess}?" if guess else _hint(detail, given)
    or_else = [choice for other in others for choice in _choices(other)]  # a union: a number, or one of some words
    what = "no such value" if choices else " or ".join([_sentence(detail), *or_else])
    if isinstance(detail["input"], bool) and what == NEEDS_A_VALUE and where != COMMAND_LINE:
        what += f", not {spoken(detail['input'])}"
    return Problem(f"{word}: {what}", where, value, choices, hint)


def _sentence(detail: Any) -> str:
    if sentence := _SENTENCES.get(detail["type"]):
        return sentence
    match detail["type"]:
        case "string_pattern_mismatch":
            most = _longest(detail)
            return f"is longer than {most} characters" if most else "has characters that may not stand here"
        case "value_error":
            return str(detail["ctx"]["error"])
    message = str(detail["msg"]).removeprefix("Input should be ")
    return f"must be {message}" if message != detail["msg"] else message[:1].lower() + message[1:]


def _longest(detail: Any) -> int:
    """How many characters a pattern allows, where the text has more of them; else 0."""
    found = re.search(r"\{0,([0-9]+)\}\$$", detail["ctx"]["pattern"])
    most = int(found[1]) + 1 if found else 0  # the first character stands apart
    return most if len(detail["input"]) > most else 0


def _choices(detail: Any) -> tuple[str, ...]:
    if detail["type"] == "literal_error":
        return tuple(part.strip(" '") for part in detail["ctx"]["expected"].replace(" or ", ", ").split(","))
    if detail["type"] in ("bool_parsing", "bool_type"):
        return ("true", "false")
    return ()


def _hint(detail: Any, given: Given | None) -> str:
    if detail["type"] == "string_type" and isinstance(detail["input"], (int, float)):
        return f'put it in quotes: {given.word if given else "key"}: "…"'
    if given and given.word.rpartition(".")[2] in ("time", "time_limit", "walltime", "max_time"):
        return "minutes, or 4:00:00, 2-00:00:00, 1h30m"
    pattern = detail.get("ctx", {}).get("pattern", "")
    if not pattern or _longest(detail):
        return ""
    if "x1f" in pattern:
        return "one line without control characters"
    if pattern.startswith("^--"):
        return "an sbatch option such as --mail-type=END"
    return "letters, digits and a few signs such as . _ - only; no blanks, no newline"
