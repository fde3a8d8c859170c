"""What the formats share: the turns, texts and schemas of a record.

A format turns a record into a ``Row`` with what stands here (of preference data: in ``answers`` too), knowing no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.catalog import BESIDE_QUERY
from hpcft.data.calls import CALL_KEYS, CONTINUES, called, calls, schema
from hpcft.data.rows import Message, Row, opened
from hpcft.data.values import Unusable, glimpsed, kind_of, listing, objects, readable, text
from hpcft.errors import near

ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "system_prompt"), "system"),
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool_call", "function_call"), "tool_call"),
    **dict.fromkeys(("tool", "function", "tool_response", "function_response", "observation", "observations"), "tool"),
}
"""Every name of a role that is understood → the one that templates know (``tool_call`` becomes an assistant turn)."""

PLAIN_ROLES = ("user", "assistant", "system")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
INSTRUCTIONS = ("instruction",)  # the name of a question of which the input is a part
FLAG_KEYS = ("loss", "loss_scale", "train", "weight")
HANDLED = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *FLAG_KEYS, *CALL_KEYS, CONTINUES))


def words(record: Mapping[str, Any], key: str) -> str:
    """The text under ``key``; absent and null are the empty text. Raises Unusable where it is not text."""
    value = record.get(key)
    return "" if value is None else text(value, key)


def message(item: Any, number: int) -> Message:
    """The ``number``-th turn of a conversation, its role and keys normalised. Raises Unusable."""
    if type(item) is dict and len(item) == 2 and (role := item.get("role")) in PLAIN_ROLES:  # as nearly all of them are
        content = item.get("content")
        if type(content) is str and readable(content):
            return {"role": role, "content": content}
    if not isinstance(item, Mapping):
        raise Unusable(f"turn {number} is {kind_of(item)}, not an object with a role and a content")
    role_key = next((key for key in ROLE_KEYS if key in item), None)
    if role_key is None:
        raise Unusable(f"turn {number} has no role; its keys are {', '.join(map(str, item)) or 'none'}")
    turn: Message = {"role": _role(item[role_key], number), "content": _content(item, number)}
    if not item.keys() <= HANDLED:
        turn |= {key: value for key, value in item.items() if key not in HANDLED and value is not None}
    if found := calls(item, number):
        turn["tool_calls"] = found
    if (loss := _loss(item, number)) is not None:
        turn["loss"] = loss
    return called(turn, number) if turn["role"] == "tool_call" else turn


def conversation(value: Any, key: str) -> tuple[Message, ...]:
    """The turns under ``key``: a list, or its JSON text as CSV files have it. Raises Unusable where there are none."""
    items = listing(value, key)
    if not items:
        raise Unusable(f"`{key}` holds no turns")
    turns = [message(item, number) for number, item in enumerate(items, 1)]
    return tuple(_continued(turns, items) if any("tool_calls" in turn for turn in turns) else turns)


def dialogue(record: Mapping[str, Any], question: Sequence[Message], response: str) -> Row:
    """A question and its answer, after the record's ``system`` and ``history`` ([[question, answer], …])."""
    turns = (*history(record), *question, {"role": "assistant", "content": response})
    return with_system(record, Row(turns, tools(record)))


def history(record: Mapping[str, Any]) -> list[Message]:
    """The turns of the record's ``history``. Raises Unusable."""
    turns: list[Message] = []
    for number, pair in enumerate(listing(record.get("history"), "history"), 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise Unusable(f"`history` entry {number} is not a pair [question, answer]")
        turns += question_and_answer(*(text(half, f"history entry {number}") for half in pair))
    return turns


def asked(record: Mapping[str, Any], choices: Sequence[str]) -> tuple[Message, ...]:
    """The question under the first of ``choices`` that the record has: its turns, or its text as one of the user.

    Below its words stands the record's input (Alpaca) or context (Dolly). Beside a question those may be anything, the
    facts of a search for example, which is then left unread; beside an instruction they are its text. Raises Unusable.
    """
    key = next(word for word in choices if word in record)
    beside: list[str] = []
    for word in BESIDE_QUERY:
        if word != key and (_may_be_text(glimpsed(record, word)) or (key in INSTRUCTIONS and not beside)):
            beside += filter(None, [words(record, word)])
    if not isinstance(parsed(record[key]), list | tuple | Mapping):
        return ({"role": "user", "content": "\n".join(filter(None, (words(record, key), *beside)))},)
    turns = half(record, key, "user")
    if not beside:
        return turns
    if turns[-1]["role"] != "user":
        return (*turns, {"role": "user", "content": "\n".join(beside)})
    content = "\n".join(filter(None, (turns[-1]["content"], *beside)))
    return (*turns[:-1], {**turns[-1], "content": content})


def half(record: Mapping[str, Any], key: str, role: str) -> tuple[Message, ...]:
    """The turns under ``key``, or its text as one turn of ``role``. Raises Unusable."""
    value = parsed(record[key])
    if isinstance(value, list | tuple):
        return conversation(value, key)
    return (message(value, 1) if isinstance(value, Mapping) else {"role": role, "content": words(record, key)},)


def parsed(value: Any) -> Any:
    """A text that is the JSON of turns, as CSV files have them, as those turns; anything else as it is.

    What has other keys, or roles that nobody has, is a text that happens to be JSON.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    listed = turns if isinstance(turns, list) else [turns]
    known = [_known_role(turn) for turn in listed if _like_turn(turn)]
    return turns if len(known) == len(listed) and any(known) else value


def untrained(turns: Sequence[Message]) -> tuple[Message, ...]:
    """``turns`` with ``loss: false`` on what the assistant says."""
    return tuple({**turn, "loss": False} if turn["role"] == "assistant" else turn for turn in turns)


def shared_gpt(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns under ``conversations`` (or ``conversation``), or ms-swift's list of {human, assistant} pairs there."""
    key = "conversations" if "conversations" in record else "conversation"
    turns = listing(record[key], key)
    if not turns or not all(isinstance(turn, Mapping) and {"human", "assistant"} <= set(turn) for turn in turns):
        return conversation(turns, key)
    pairs = (question_and_answer(words(turn, "human"), words(turn, "assistant")) for turn in turns)
    return tuple(turn for pair in pairs for turn in pair)


def question_and_answer(query: str, response: str) -> list[Message]:
    """Two turns."""
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


def with_system(record: Mapping[str, Any], row: Row) -> Row:
    """``row`` with the record's own ``system`` (or ``system_prompt``) before its turns, where it has one."""
    text = words(record, "system") or words(record, "system_prompt")
    return opened(row, text) if text else row


def tools(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The tool schemas of the record, given as a list or as its JSON text; None where there are none."""
    return tuple(schema(tool) for tool in objects(record.get("tools"), "tools")) or None


def _continued(turns: Sequence[Message], items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """``turns``, made of ``items``, each tool_call of which says so that comes right after a turn of the assistant."""
    result: list[Message] = []
    for turn, item in zip(turns, items, strict=True):
        role = next(item[key] for key in ROLE_KEYS if key in item)
        continues = result and result[-1]["role"] == "assistant" and ROLES[role.lower()] == "tool_call"
        result.append({**turn, CONTINUES: True} if continues else turn)
    return result


def _may_be_text(value: Any) -> bool:
    """Whether ``value`` is text, a number as a table may have it, or nothing."""
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def _like_turn(value: Any) -> bool:
    """Whether a value of JSON has the keys of a turn: a role and what is said."""
    return (
        isinstance(value, Mapping)
        and any(key in value for key in ROLE_KEYS)
        and any(key in value for key in (*CONTENT_KEYS, *CALL_KEYS))
    )


def _known_role(turn: Mapping[str, Any]) -> bool:
    role = next(turn[key] for key in ROLE_KEYS if key in turn)
    return isinstance(role, str) and role.lower() in ROLES


def _role(value: Any, number: int) -> str:
    known = ROLES.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        nearest = near(str(value), ROLES)
        meant = f"did you mean {nearest}? " if nearest else ""
        raise Unusable(f"turn {number} has the unknown role {value!r}", hint=f"{meant}roles: {', '.join(ROLES)}")
    return known


def _content(item: Mapping[str, Any], number: int) -> str:
    value = next((item[key] for key in CONTENT_KEYS if item.get(key) is not None), None)
    if value is None and not any(key in item for key in (*CONTENT_KEYS, *CALL_KEYS)):
        raise Unusable(f"turn {number} has no content; its keys are {', '.join(map(str, item))}")
    if isinstance(value, list | tuple):
        return "".join(_part(part, number) for part in value)
    if isinstance(value, Mapping):  # a tool call or its answer, written as an object instead of its JSON text
        value = json.dumps(value, ensure_ascii=False)
    return text(value, f"content of turn {number}")


def _part(part: Any, number: int) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        raise Unusable(f"turn {number} has a part of type {kind}; this release trains on text only")
    return text(part.get("text"), f"text of turn {number}")


def _loss(item: Mapping[str, Any], number: int) -> bool | None:
    for key in FLAG_KEYS:
        if (flag := item.get(key)) is not None:
            if flag not in (0, 1):
                raise Unusable(
                    f"`{key}` of turn {number} is {flag!r}", hint="use true or false: a turn is trained or not"
                )
            return bool(flag)
    return None
