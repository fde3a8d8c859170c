"""The calls of tools in a turn, in any spelling, as templates know them: a type, and a function with its arguments.

The arguments are an object. OpenAI's files have the JSON text of one, which a template would write between quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpcft.data.rows import Message
from hpcft.data.values import Unusable, objects, unpacked

CALL_KEYS = ("tool_calls", "function_call")
OUTSIDE = ("id", "type")  # what of a call stands beside its function


def calls(item: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The calls of the ``number``-th turn: ``tool_calls``, or OpenAI's older ``function_call``. Raises Unusable."""
    if not any(item.get(key) for key in CALL_KEYS):
        return []
    key = next(key for key in CALL_KEYS if item.get(key))
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


def joined(turn: Message, call: Message, number: int) -> Message:
    """``turn`` of the assistant with the calls of ``call``, the ``number``-th turn, which comes right after it.

    Two turns would teach a model to stop before the call. Raises Unusable where only one of them is to be trained.
    """
    if turn.get("loss", True) != call.get("loss", True):
        raise Unusable(
            f"turn {number} is a tool call, and its loss is not that of the assistant's turn before it",
            hint="the two are one turn to a model: give both the same loss",
        )
    return {**turn, "tool_calls": [*turn.get("tool_calls", ()), *call["tool_calls"]]}


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
        where = f"arguments of {function['name']} in turn {number}"
        function["arguments"] = unpacked(said, where) if said.strip() else {}
    return {**given, "function": function}
