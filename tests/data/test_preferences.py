"""Every spelling of a pair becomes the same two conversations, of a rated answer the same turns and label."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcft.data.rows import Row, filled, opened
from hpcft.data.shapes import Shaped
from hpcft.errors import Refusal

ASKED = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = ({"role": "assistant", "content": content} for content in "45")
SYSTEM, BEFORE = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes?"}
CHOSEN, REJECTED = {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}
HUMAN = {"from": "human", "value": "2 + 2?"}
BOTH = {"chosen": "4", "rejected": "5"}
RESPONSES = {"chosen_response": "4", "rejected_response": "5"}


def row(record: Any, rows: str = "pair") -> Row:
    return Shaped("a.jsonl", rows).row(7, record)


def refused(record: Any, rows: str = "pair") -> str:
    with pytest.raises(Refusal, match=r"a\.jsonl:7: ") as refusal:
        row(record, rows)
    return str(refusal.value)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", **BOTH},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2 + 2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": " 2 + 2?\n", "messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])},
        {"chosen_messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        {"messages": [ASKED, GOOD], "rejected_response": "5"},
        {"messages": [ASKED, GOOD], "rejected_response": [BAD]},
        {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        {"messages": [ASKED, GOOD], "rejected_response": None, "rejected_messages": [ASKED, BAD]},
        {"conversations": [HUMAN, CHOSEN], "rejected_response": "5"},
        {"query": "2 + 2?", "response": "4", "rejected_response": "5"},
        {"instruction": "2 + 2?", "input": "", **BOTH},
        {"conversations": [HUMAN], "chosen": CHOSEN, "rejected": REJECTED},
        {"conversations": [HUMAN], "chosen": json.dumps(CHOSEN), "rejected": "5"},
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
        {"messages": [ASKED], **RESPONSES},
        {"instruction": "2 + 2?", **RESPONSES},
        {"question": "2 + 2?", **BOTH},
        {"input": "2 + 2?", **BOTH},
        {"prompt": "2 + 2?", "chosen": 4, "rejected": 5},
    ],
)
def test_a_pair_in_any_spelling_is_two_conversations_with_one_prompt(record: dict[str, Any]) -> None:
    found = row(record)
    assert (found.messages, found.rejected, found.shared) == ((ASKED, GOOD), (ASKED, BAD), 1)
    assert (found.label, found.margin) == (None, None)


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "question": "2 + 2?", **BOTH},
        {"prompt": [SYSTEM, ASKED], **BOTH},
        {"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]},
        {"system": "Be brief.", "messages": [ASKED, GOOD], "rejected_response": "5"},
        {"prompt": [SYSTEM, ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "2 + 2?", "chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]},
    ],
)
def test_both_conversations_begin_with_the_system_turn(record: dict[str, Any]) -> None:
    found = row(record)
    assert (found.messages, found.rejected) == ((SYSTEM, ASKED, GOOD), (SYSTEM, ASKED, BAD))


def test_the_prompt_is_all_that_both_conversations_begin_with() -> None:
    long = [ASKED, BEFORE, ASKED]
    assert row({"chosen": [*long, GOOD], "rejected": [*long, BAD]}).shared == 3
    assert row({"query": "2 + 2?", "history": [["2 + 2?", "Yes?"]], **BOTH}).shared == 3
    assert row({"messages": [*long, GOOD], "rejected_response": "5"}).shared == 3
    whole = {"query": "2 + 2?", "history": [["2?", "Yes?"]], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    assert row(whole).shared == 3
    assert row({"prompt": [ASKED], "chosen": [GOOD, ASKED, GOOD], "rejected": [BAD, ASKED, BAD]}).shared == 1


def test_several_rejected_turns_stand_for_all_after_the_users_last_words() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    answered = {"role": "tool", "content": "4"}
    record = {"messages": [ASKED, call, answered, GOOD], "rejected_response": [BEFORE, BAD]}
    assert row(record).rejected == (ASKED, BEFORE, BAD)
    assert row({**record, "rejected_response": "5"}).rejected == (ASKED, call, answered, BAD)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [ASKED], "completion": [GOOD]},
        {"messages": [ASKED, GOOD]},
        {"conversations": [HUMAN, CHOSEN]},
        {"query": "2 + 2?", "response": "4"},
    ],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), ("1", True)],
)
def test_a_rated_answer_in_any_spelling_is_turns_and_a_label(
    record: dict[str, Any], key: str, label: Any, good: bool
) -> None:
    found = row({**record, key: label}, "rated")
    assert (found.messages, found.rejected, found.label) == ((ASKED, GOOD), (), good)


def test_alpacas_records_are_rated_by_kto_tag_alone_for_label_may_be_anything_there() -> None:
    record = {"instruction": "2 + 2?", "output": "4"}
    assert row({**record, "kto_tag": False}, "rated").label is False
    assert row({**record, "label": "sums"}, "chat").messages == (ASKED, GOOD)


@pytest.mark.parametrize(("margin", "number"), [(2, 2.0), (0.5, 0.5), ("0.5", 0.5), (None, None), ("", None)])
def test_a_margin_is_a_number_or_absent(margin: Any, number: float | None) -> None:
    assert row({"prompt": "2 + 2?", **BOTH, "margin": margin}).margin == number


@pytest.mark.parametrize(
    ("record", "sentences"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, ["`rejected` is null", "a pair needs both answers"]),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, ["`chosen`: `chosen` holds no turns"]),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, ["`chosen`: turn 1 is a text, not an object"]),
        ({"prompt": "a", "chosen": {"text": "b"}, "rejected": "c"}, ["`chosen`: turn 1 has no role"]),
        ({"prompt": "a", "chosen": [ASKED], "rejected": "c"}, ["`chosen` is no answer", "none the assistant's"]),
        ({"prompt": "a", "chosen": 1.5, "rejected": "c"}, ["`chosen` is a number, not text"]),
        ({"prompt": "a", "chosen": True, "rejected": "c"}, ["`chosen` is a boolean, not text"]),
        (
            {"prompt": "3 + 3?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            ["`chosen` is a conversation about something else", "leave the prompt's turns out"],
        ),
        ({"chosen": "4", "rejected": "5"}, ["there is no prompt", "begins with the assistant's words", "add `prompt`"]),
        (
            {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "3?"}, GOOD]},
            ["part in turn 1, which is the user's", "both must answer the same prompt"],
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, ["only goes on where the other ends"]),
        ({"messages": [ASKED], "rejected_response": "5"}, ["the last turn is not the assistant's", "good answer"]),
        ({"messages": [ASKED, BEFORE], **BOTH}, ["ends with the assistant's words", "end it with the turn"]),
        ({"messages": None, "rejected_response": "5"}, ["`messages` holds no turns"]),
        ({"prompt": "a", **BOTH, "margin": "much"}, ['`margin` is a text, not a finite number: "much"']),
        ({"prompt": "a", **BOTH, "margin": float("nan")}, ["not a finite number"]),
        ({"prompt": "a", **BOTH, "margin": True}, ["`margin` is a boolean"]),
    ],
)
def test_a_pair_that_is_none_is_refused_with_the_answer_by_name(record: Any, sentences: list[str]) -> None:
    message = refused(record)
    assert all(sentence in message for sentence in sentences), message


@pytest.mark.parametrize("label", ["yes", 2, 0.5, None, [], "", {"good": True}])
def test_a_label_that_is_neither_true_nor_false_is_refused_with_its_value(label: Any) -> None:
    message = refused({"messages": [ASKED, GOOD], "label": label}, "rated")
    assert f"`label` is {json.dumps(label)}, neither true nor false" in message


@pytest.mark.parametrize(
    ("record", "rows", "sentences"),
    [
        ({"messages": [ASKED, GOOD]}, "pair", ["has no rejected answer", "valid: turns_pair", "are for task sft"]),
        (
            {"messages": [ASKED, GOOD]},
            "rated",
            ["has no label", "valid: rated_completion", "give every"],
        ),
        ({"prompt": "a", "response": "b", "rejected": "c"}, "pair", ["has `rejected` but not the other answer"]),
        ({"prompt": "a", "rejected": "c"}, "pair", ["no known shape", "nearest is pair, which needs chosen"]),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "pair", ["is `choosen` meant to be `chosen`?"]),
        ({"prompt": "a", **BOTH}, "chat", ["is a prompt with a chosen and a rejected", "good answers alone"]),
        ({"prompt": "a", **BOTH}, "rated", ["has no label", "each answer as a record of its own"]),
        (
            {"messages": [ASKED, GOOD], "label": True},
            "chat",
            ["one answer and a label", "the records labelled true"],
        ),
        ({"messages": [ASKED, GOOD], "label": True}, "pair", ["one answer and a label", "two answers to one prompt"]),
        ({"text": "a"}, "pair", ["has no rejected answer (shape text)"]),
    ],
)
def test_a_record_of_another_kind_than_the_run_needs_is_refused_with_what_to_do(
    record: Any, rows: str, sentences: list[str]
) -> None:
    message = refused(record, rows)
    assert all(sentence in message for sentence in sentences), message


def test_null_columns_of_another_kind_are_as_good_as_absent() -> None:
    record = {"messages": [ASKED, GOOD], "rejected_response": None, "label": None}
    assert row(record, "chat").messages == (ASKED, GOOD)
    assert row({**record, "label": True}, "rated").label is True
    assert row({**record, "rejected_response": "5"}).rejected == (ASKED, BAD)
    assert "`rejected_response` is null" in refused(record)


def test_equal_pairs_have_equal_digests_whatever_their_shape_and_margin_and_swapped_ones_do_not() -> None:
    pairs: list[Any] = [
        {"prompt": "2 + 2?", **BOTH},
        {"messages": [ASKED, GOOD], "rejected_response": "5", "margin": 3},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "id": 9},
    ]
    assert len({row(record).digest for record in pairs}) == 1
    assert row({"prompt": "2 + 2?", "chosen": "5", "rejected": "4"}).digest != row(pairs[0]).digest
    rated = [row({"messages": [ASKED, GOOD], "label": label}, "rated").digest for label in (True, False)]
    assert len({*rated, row({"messages": [ASKED, GOOD]}, "chat").digest}) == 3


def test_system_name_and_author_reach_both_conversations() -> None:
    pair = row({"prompt": "who ?", "chosen": "{{NAME}}", "rejected": "not {{NAME}}"})
    found = filled(opened(pair, "By {{AUTHOR}}."), {"{{NAME}}": "Ada", "{{AUTHOR}}": "us"})
    assert [turn["content"] for turn in found.messages] == ["By us.", "who ?", "Ada"]
    assert [turn["content"] for turn in found.rejected] == ["By us.", "who ?", "not Ada"]
