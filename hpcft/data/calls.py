"""The calls of tools in a turn, in any spelling, as templates know them: a type, and a function with its arguments.

The arguments are an object. OpenAI's files have the JSON text of one, which a template would write between quotes. A
text that is no JSON, as models write at times, stays what it is and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.data.rows import Message
from hpcft.data.values import Unusable, objects

CALL_KEYS = ("tool_calls", "function_call")
CONTINUES = "continues_turn"  # a key of a turn: it was a tool_call, right after what the assistant says or calls
NO_CALLS = ("none", "auto")  # what a request says about calls, and some files' turns
OUTSIDE = ("id", "type")  # what of a call stands beside its function


def calls(item: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The calls of the ``number``-th turn: ``tool_calls``, or OpenAI's older ``function_call``. Raises Unusable."""
    if not any(item.get(key) for key in CALL_KEYS):
        return []
    key = next(key for key in CALL_KEYS if item.get(key))
    if item[key] in NO_CALLS:
        return []
    value = [item[key]] if key == "function_call" else item[key]
    return [_call(call, number) for call in objects(value, f"{key} of turn {number}")]


def called(turn: Message, number: int) -> Message:
    """A turn of role tool_call, whose content is the call as JSON, as the assistant turn that templates know."""
    try:
        found = json.loads(turn["content"])
    except ValueError as error:
        raise Unusable(f"turn {number} is a tool call whose content is not JSON: {error}") from error
    listed = found if isinstance(found, list) else [found]
    return {**turn, "role": "assistant", "content": "", "tool_calls": [_call(call, number) for call in listed]}


def joined(turns: Sequence[Message], words: bool, calls: bool) -> tuple[Message, ...]:
    """``turns``, in which a call that continues the assistant's turn is part of it, as far as a template writes that.

    Two turns would teach a model to stop before the call. words, calls: whether the template writes words and a call in
    one turn, and two calls. Raises Unusable where only one of two such turns is to be trained.
    """
    result: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if CONTINUES not in turn:
            result.append(turn)
            continue
        said, call = result[-1], {key: value for key, value in turn.items() if key != CONTINUES}
        if not (calls if said.get("tool_calls") else words or not said["content"].strip()):
            result.append(call)
            continue
        if said.get("loss", True) != call.get("loss", True):
            raise Unusable(
                f"turn {number} is a tool call, and its loss is not that of the assistant's turn before it, "
                "though the two are one turn to a model: give both the same loss"
            )
        result[-1] = {**said, "tool_calls": [*said.get("tool_calls", ()), *call["tool_calls"]]}
    return tuple(result)


def are_texts(turns: Sequence[Message]) -> bool:
    """Whether the arguments of a call in ``turns`` are a text: not an object, nor the JSON of one."""
    return any(
        isinstance(call["function"].get("arguments"), str) for turn in turns for call in turn.get("tool_calls", ())
    )


def schema(tool: Any) -> Any:
    """The schema of a tool as chat templates know it, {type, function}, where it is the function's own alone."""
    if not isinstance(tool, Mapping) or "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _call(call: Any, number: int) -> dict[str, Any]:
    given = dict(call) if isinstance(call, Mapping) else {}
    if not isinstance(given.get("function"), Mapping):  # name and arguments stand in the call itself
        outside = {key: given.pop(key) for key in OUTSIDE if key in given}
        given = {"type": "function", **outside, "function": given}
    function = dict(given["function"])
    if not function.get("name"):
        raise Unusable(f"turn {number} is a tool call without a name", hint='write {"name": …, "arguments": {…}}')
    if isinstance(said := function.get("arguments"), str):
        function["arguments"] = _arguments(said) if said.strip() else {}
    return {**given, "function": function}


def _arguments(said: str) -> Any:
    """The object that ``said`` holds, line breaks in its texts allowed; any other text as it is."""
    if said.lstrip()[:1] != "{":
        return said
    try:
        return json.loads(said, strict=False)
    except (ValueError, RecursionError):
        return said
