"""Each shape is found by its keys and becomes the canonical row; what is no known shape is refused with the nearest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcft.catalog import FORMATS
from hpcft.data.calls import CONTINUES, joined
from hpcft.data.rows import Row, filled, opened
from hpcft.data.shapes import Shaped, shape_of
from hpcft.data.turns import ROLES
from hpcft.data.values import Unusable
from hpcft.errors import Refusal

ASKED, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 2}}


def row(record: Any, rows: str = "chat") -> Row:
    return Shaped("a.jsonl", rows).row(7, record)


def refused(record: Any, rows: str = "chat") -> str:
    with pytest.raises(Refusal, match=r"a\.jsonl:7: ") as refusal:
        row(record, rows)
    return str(refusal.value)


@pytest.mark.parametrize("name", FORMATS)
def test_the_sample_of_every_format_is_found_by_its_keys_and_read(name: str) -> None:
    sample = json.loads(FORMATS[name].sample)
    assert shape_of(frozenset(sample), FORMATS[name].rows) == name
    found = row(sample, FORMATS[name].rows)
    assert found.text == sample.get("text")
    if FORMATS[name].rows == "labelled":
        assert found.category == sample["label"]
        return
    assert name == "text" or found.messages[-1]["content"] in "45"
    assert bool(found.rejected) == (FORMATS[name].rows == "pair")
    assert (found.label is not None) == (FORMATS[name].rows == "rated")


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [ASKED, SAID]}, [ASKED, SAID]),
        ({"messages": [ASKED, SAID], "system": "Be brief."}, [SYSTEM, ASKED, SAID]),
        ({"messages": json.dumps([ASKED, SAID])}, [ASKED, SAID]),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [ASKED, SAID]),
        ({"conversations": [ASKED, SAID]}, [ASKED, SAID]),
        ({"conversation": [{"human": "2 + 2?", "assistant": "4"}], "system": "Be brief."}, [SYSTEM, ASKED, SAID]),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, [ASKED, SAID]),
        ({"instruction": "2", "input": "+ 2?", "output": "4"}, [{**ASKED, "content": "2\n+ 2?"}, SAID]),
        ({"instruction": "2", "context": "+ 2?", "response": "4"}, [{**ASKED, "content": "2\n+ 2?"}, SAID]),
        ({"instruction": None, "input": "2 + 2?", "output": "4"}, [ASKED, SAID]),
        ({"instruction": "2", "input": "+", "context": "2?", "output": "4"}, [{**ASKED, "content": "2\n+\n2?"}, SAID]),
        ({"instruction": "2", "input": "+ 2?", "answer": "4"}, [{**ASKED, "content": "2\n+ 2?"}, SAID]),
        ({"question": "2", "input": "+ 2?", "output": "4"}, [{**ASKED, "content": "2\n+ 2?"}, SAID]),
        ({"context": "+ 2?", "question": "2", "answer": "4"}, [{**ASKED, "content": "2\n+ 2?"}, SAID]),
        ({"input": "2 + 2?", "output": "4"}, [ASKED, SAID]),
        ({"prompt": [ASKED, SAID, ASKED], "response": "4"}, [ASKED, SAID, ASKED, SAID]),
        ({"instruction": "2 + 2?", "output": "4", "history": [["2 + 2?", "4"]]}, [ASKED, SAID, ASKED, SAID]),
        ({"query": "2 + 2?", "response": "4", "history": None, "system": "Be brief."}, [SYSTEM, ASKED, SAID]),
        ({"question": "2 + 2?", "answer": 4}, [ASKED, SAID]),
        ({"problem": "2 + 2?", "solution": "4"}, [ASKED, SAID]),
        ({"prompt": "2 + 2?", "completion": "4"}, [ASKED, SAID]),
        ({"prompt": [ASKED], "completion": [SAID]}, [ASKED, SAID]),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}, [ASKED, SAID]),
        ({"prompt": json.dumps(ASKED), "completion": json.dumps(SAID)}, [ASKED, SAID]),
        (
            {"prompt": "[1, 2]", "completion": '{"a": 1}'},
            [{**ASKED, "content": "[1, 2]"}, {**SAID, "content": '{"a": 1}'}],
        ),
        ({"prompt": [ASKED, SAID, ASKED], "completion": "4"}, [ASKED, {**SAID, "loss": False}, ASKED, SAID]),
        ({"prompt": "2 + 2?", "response": "4"}, [ASKED, SAID]),
    ],
)
def test_a_record_becomes_its_turns(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert list(row(record).messages) == messages


def test_the_input_beside_a_question_is_part_of_it_in_every_kind_of_record() -> None:
    asked = {**ASKED, "content": "2\n+ 2?"}
    question = {"question": "2", "input": "+ 2?"}
    both = row({**question, "chosen": "4", "rejected": "5"}, "pair")
    assert (both.messages[0], both.rejected[0]) == (asked, asked)
    assert row({**question, "label": "sum"}, "labelled").messages == (asked,)
    rated = {"instruction": "2", "input": "+ 2?", "output": "4", "kto_tag": True}
    assert row(rated, "rated").messages[0] == asked
    pair = {"query": "2", "input": "+ 2?", "response": "4", "rejected_response": "5"}
    assert row(pair, "pair").messages[0] == asked


@pytest.mark.parametrize("beside", [{"title": ["a"], "sentences": [["b"]]}, ["a", "b"], 1.5, True])
def test_what_is_beside_a_question_and_no_text_is_left_unread(beside: Any) -> None:
    shaped = Shaped("a.jsonl")
    asked = {"question": "2 + 2?", "answer": "4", "context": beside}
    assert shaped.row(1, asked).messages == (ASKED, SAID)
    assert dict(shaped.unread) == {"context": 1}
    both = {"instruction": "2", "input": "+ 2?", "output": "4", "context": beside}
    assert row(both).messages == ({**ASKED, "content": "2\n+ 2?"}, SAID)
    for context in (None, "", "2"):
        instruction = {"instruction": "2", "input": beside, "context": context, "output": "4"}
        assert "`input` is " in refused(instruction), "it would be trained without"
    empty = Shaped("a.jsonl")
    empty.row(1, {"question": "2 + 2?", "answer": "4", "context": None})
    assert not empty.unread


@pytest.mark.parametrize(
    "words",
    [
        '{"from": "Paris", "to": "Rome"}',
        '[{"from": "Paris", "to": "Rome"}]',
        '{"role": "admin", "age": 3}',
        '{"role": "admin", "content": "all"}',
        '{"role": "user", "age": 3}',
    ],
)
def test_words_that_are_json_but_no_turns_are_words(words: str) -> None:
    for record in ({"query": words, "response": "4"}, {"instruction": words, "output": "4"}):
        assert row(record).messages == ({**ASKED, "content": words}, SAID)
    for record in ({"prompt": words, "completion": "4"}, {"prompt": words, "chosen": "4", "rejected": "5"}):
        assert row(record, "pair" if "chosen" in record else "chat").messages[0]["content"] == words
    typo = json.dumps([{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}])
    assert "did you mean assistant?" in refused({"query": typo, "response": "4"})


def test_the_input_beside_turns_is_part_of_the_last_of_the_users() -> None:
    asked, beside = {"role": "user", "content": "2"}, {"input": "+ 2?", "output": "4"}
    for turns in ([asked], [SYSTEM, asked]):
        made = row({"instruction": json.dumps(turns), **beside}).messages
        assert made == (*turns[:-1], {**ASKED, "content": "2\n+ 2?"}, SAID)
    made = row({"instruction": json.dumps([SYSTEM]), "input": "2 + 2?", "output": "4"}).messages
    assert made == (SYSTEM, ASKED, SAID)


def test_a_pairs_prompt_may_be_the_json_text_of_turns_as_its_answers_may() -> None:
    answers = {"chosen": json.dumps([SAID]), "rejected": json.dumps([{**SAID, "content": "5"}])}
    assert row({"prompt": json.dumps([SYSTEM, ASKED]), **answers}, "pair").messages == (SYSTEM, ASKED, SAID)


def test_every_name_of_a_role_is_understood() -> None:
    for name, role in ROLES.items():
        content = json.dumps(CALL) if role == "tool_call" else "x"
        (turn,) = row({"messages": [{"from": name.upper(), "value": content}]}).messages
        assert turn["role"] == ("assistant" if role == "tool_call" else role)


def test_tool_calls_and_tools_keep_what_templates_read() -> None:
    call = {"type": "function", "function": CALL}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": {"sum": 4}}]
    whole = row({"messages": turns, "tools": json.dumps(tools)})
    assert whole.messages == (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sum": 4}'},
    )
    assert whole.tools == tuple(tools)
    assert row({"messages": [{"role": "tool_call", "content": json.dumps([CALL])}]}).messages[0]["tool_calls"] == [call]


SPELLED = {"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [SPELLED]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([SPELLED])},
        {"role": "assistant", "tool_calls": [json.dumps(SPELLED)]},
        {"role": "assistant", "content": None, "function_call": SPELLED["function"], "tool_calls": None},
        {"role": "assistant", "function_call": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps(SPELLED["function"])},
    ],
)
def test_a_call_in_any_spelling_has_an_object_for_its_arguments(turn: dict[str, Any]) -> None:
    call = {"type": "function", "function": CALL}
    (read,) = row({"messages": [turn]}).messages
    assert read == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_arguments_that_are_no_object_stay_what_they_are_and_none_are_none() -> None:
    texts = ("print(1)", "{'a': 1}", '{"a": 2', '{"a": "x\ny"}', "")
    said = {"role": "assistant", "tool_calls": [{"name": "run", "arguments": text} for text in texts]}
    (turn,) = row({"messages": [said]}).messages
    assert [call["function"]["arguments"] for call in turn["tool_calls"]] == [*texts[:3], {"a": "x\ny"}, {}]
    call = {"role": "function_call", "content": json.dumps({"name": "run", "arguments": "{'a': 1}"})}
    (turn,) = row({"messages": [call]}).messages
    assert turn["tool_calls"][0]["function"]["arguments"] == "{'a': 1}"


@pytest.mark.parametrize("none", ["none", "auto", "", None])
def test_a_turn_that_says_that_it_calls_nothing_calls_nothing(none: str | None) -> None:
    assert row({"messages": [ASKED, {**SAID, "function_call": none}]}).messages == (ASKED, SAID)


def test_tools_may_be_texts_of_their_schemas() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    for tools in ([tool], [json.dumps(tool)], json.dumps([tool])):
        assert row({"messages": [ASKED, SAID], "tools": tools}).tools == (tool,)
    for flat in (
        {"name": "add"},
        {"type": "function", "name": "add"},
    ):  # a function's own schema, and as responses have it
        assert row({"messages": [ASKED, SAID], "tools": [flat]}).tools == (tool,)


def test_calls_right_after_the_assistants_words_or_another_call_are_one_turn_with_them() -> None:
    call, words = {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "assistant", "content": "I add."}
    result = {"role": "tool_response", "content": "4"}
    apart = row({"messages": [ASKED, call, call, result, result, words, call, result, SAID]}).messages
    assert len(apart) == 9
    turns = joined(apart, words=True, calls=True)
    assert not any(CONTINUES in turn for turn in turns)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert [len(turn.get("tool_calls", ())) for turn in turns] == [0, 2, 0, 0, 1, 0, 0]
    assert (turns[1]["content"], turns[4]["content"]) == ("", "I add.")
    silent = row({"messages": [{**words, "loss": False}, {**call, "loss": False}]}).messages
    assert [turn["loss"] for turn in joined(silent, words=True, calls=True)] == [False]
    unlike = row({"messages": [ASKED, {**words, "loss": False}, call]}).messages
    assert len(joined(unlike, words=False, calls=True)) == 3
    with pytest.raises(Unusable, match=r"turn 3 .*give both the same loss"):
        joined(unlike, words=True, calls=False)


@pytest.mark.parametrize(
    ("words", "calls", "many"),
    [(True, True, [0, 2, 3]), (False, True, [0, 2, 0, 3]), (True, False, [0, 1, 1, 1, 1, 1])],
)
def test_calls_stay_turns_of_their_own_where_a_template_does_not_write_them_in_one(
    words: bool, calls: bool, many: list[int]
) -> None:
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    said = {"role": "assistant", "content": "I add."}
    turns = row({"messages": [ASKED, call, call, said, call, call, call]}).messages
    made = joined(turns, words, calls)
    assert [len(turn.get("tool_calls", ())) for turn in made] == many
    assert not any(CONTINUES in turn for turn in made)
    silent = row({"messages": [ASKED, {**said, "content": " "}, call]}).messages
    assert len(joined(silent, words=False, calls=False)) == 2, "no words are lost"


def test_text_parts_are_joined_and_pictures_refused() -> None:
    parts = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]
    assert row({"messages": [{"role": "user", "content": parts}]}).messages == (ASKED,)
    assert "text only" in refused({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("record", "sentences"),
    [
        (["a"], ["an object with keys"]),
        ({"instuction": "a", "output": "b"}, ["nearest is alpaca", "is `instuction` meant to be `instruction`?"]),
        ({"mesages": []}, ["nearest is messages", "is `mesages` meant to be `messages`?"]),
        ({"id": 1}, ["no known shape", "valid: messages, sharegpt"]),
        ({}, ["no known shape"]),
        ({"messages": []}, ["`messages` holds no turns"]),
        ({"messages": "hello"}, ["is a text that is not JSON"]),
        ({"messages": {"role": "user"}}, ["`messages` is an object, not a list"]),
        ({"messages": ["hello"]}, ["turn 1 is a text, not an object"]),
        ({"messages": [ASKED, {"content": "4"}]}, ["turn 2 has no role"]),
        (
            {"messages": [ASKED, {"role": "asistant", "content": "4"}]},
            ["unknown role 'asistant'", "did you mean assistant?"],
        ),
        ({"messages": [ASKED, {"role": "assistant"}]}, ["turn 2 has no content"]),
        ({"messages": [ASKED, {**SAID, "loss": 0.5}]}, ["`loss` of turn 2 is 0.5", "true or false"]),
        ({"messages": [ASKED, {**SAID, "loss": "no"}]}, ["`loss` of turn 2 is 'no'"]),
        ({"messages": [ASKED, {**SAID, "loss_scale": 2.0}]}, ["`loss_scale` of turn 2 is 2.0", "true or false"]),
        ({"messages": [ASKED, SAID], "images": ["a.png"]}, ["has `images`", "trains on text only", "value: ['a.png']"]),
        ({"messages": [ASKED, SAID], "images": [None, {"bytes": b"PNG", "path": None}]}, ["has `images`"]),
        ({"messages": [ASKED, SAID], "images": [[], ["a.png"]]}, ["has `images`"]),
        ({"messages": [ASKED, SAID], "audios": [{"array": [0.0, 0.5], "path": None}]}, ["has `audios`"]),
        ({"query": "2 + 2?", "response": "4", "audios": "a.wav"}, ["has `audios`"]),
        ({"conversations": [{**ASKED, "content": "<image>?"}, SAID], "image": "a.png"}, ["has `image`"]),
        ({"messages": [{"role": "tool_call", "content": "add"}]}, ["whose content is not JSON"]),
        ({"messages": [{"role": "tool_call", "content": "{}"}]}, ["without a name"]),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, ["turn 2 is a tool call without"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": "add()"}]},
            ["`tool_calls of turn 1` is a text"],
        ),
        ({"instruction": "a", "output": ["b"]}, ["`output` is a list, not text"]),
        ({"instruction": "a", "output": 1.5}, ["`output` is a number, not text", "in quotes"]),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, ["`history` entry 1 is not a pair"]),
        ({"text": "\ud83d"}, ["half of a UTF-16 pair"]),
    ],
)
def test_a_record_that_cannot_be_a_row_is_refused_with_file_line_and_reason(record: Any, sentences: list[str]) -> None:
    message = refused(record)
    assert all(sentence in message for sentence in sentences), message


def test_a_file_of_mixed_shapes_is_refused_where_the_second_shape_begins() -> None:
    shaped = Shaped("a.jsonl")
    shaped.row(1, {"text": "a"})
    with pytest.raises(Refusal, match=r"a\.jsonl:2: .*shape messages, .*\(line 1\) is text"):
        shaped.row(2, {"messages": [ASKED, SAID]})


@pytest.mark.parametrize(
    "more",
    [
        {"images": []},
        {"images": None, "videos": "[]"},
        {"image": "https://a.b/c.png"},
        {"images": [None], "audios": [[]]},
        {"images": ["", " "], "videos": 2},
        {"images": [{"bytes": None, "path": None}], "audios": 0.5},
        {"images": "null", "videos": [0]},
    ],
)
def test_columns_for_pictures_that_show_none_are_no_reason_to_refuse_a_record(more: dict[str, Any]) -> None:
    assert row({"messages": [ASKED, SAID], **more}).messages == (ASKED, SAID)


def test_keys_that_nobody_read_are_counted() -> None:
    shaped = Shaped("a.jsonl")
    for _ in range(3):
        shaped.row(1, {"problem": "a", "solution": "long", "answer": "b", "label": True})
    assert dict(shaped.unread) == {"solution": 3, "label": 3}


def test_the_default_system_prompt_gives_way_to_a_rows_own() -> None:
    assert opened(Row((ASKED, SAID)), "Be brief.").messages[0] == SYSTEM
    assert opened(Row((SYSTEM, ASKED)), "Other").messages == (SYSTEM, ASKED)
    assert opened(Row(text="raw"), "Other") == Row(text="raw")


def test_name_and_author_are_filled_in() -> None:
    row_ = Row(({"role": "assistant", "content": "I am {{NAME}} by {{AUTHOR}}."},))
    assert filled(row_, {"{{NAME}}": "Ada", "{{AUTHOR}}": "us"}).messages[0]["content"] == "I am Ada by us."


def test_equal_rows_have_equal_digests_whatever_their_shape() -> None:
    shapes: list[Any] = [
        {"messages": [ASKED, SAID]},
        {"query": "2 + 2?", "response": "4", "id": 9},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"value": "4", "from": "gpt"}]},
    ]
    assert len({row(record).digest for record in shapes}) == 1
    assert row({"text": "a"}).digest != row({"text": "b"}).digest
