"""In the chat forms of public models the assistant's words and their end are trained, nothing else; masks/ shows it."""

from __future__ import annotations

import difflib
import re
from typing import Any

import pytest

from hpcft.data.documents import Document, Turn
from hpcft.data.inspect import BRACKETED, marked
from hpcft.data.shapes import Shaped
from tests.data import masked
from tests.data.masked import CHATS, FORMS
from tests.data.small import chat

ALL = [(name, title) for name, form in FORMS.items() for title in form.chats]


TURNS = CHATS["a tool call"]["messages"]


def trained(name: str, title: str) -> list[str]:
    """The text of every run of trained tokens."""
    return re.findall(r"⟦(.*?)⟧", masked.shown(name, title), re.DOTALL)


def runs(name: str, turns: list[dict[str, Any]]) -> list[str]:
    """The same of a chat that has the tool."""
    encoder, tokenizer = masked.encoder(name)
    [made] = encoder.documents([Shaped("chats").row(1, {"tools": [masked.TOOL], "messages": turns})])
    assert not isinstance(made, str), made
    return re.findall(r"⟦(.*?)⟧", marked(made.tokens.tolist(), made.trained.tolist(), tokenizer, BRACKETED), re.DOTALL)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_trained_is_what_the_committed_text_shows(name: str) -> None:
    file = masked.GOLDEN / f"{name}.txt"
    then, now = file.read_text(encoding="utf-8").splitlines(), masked.page(name).splitlines()
    changes = "\n".join(difflib.unified_diff(then, now, f"masks/{name}.txt", "now", lineterm=""))
    assert not changes, f"what is trained has changed: read it, then: make golden\n{changes}"


def test_every_form_has_its_text_and_every_text_its_form() -> None:
    assert sorted(path.stem for path in masked.GOLDEN.iterdir()) == sorted(FORMS)
    assert sorted(path.stem for path in masked.FOLDER.iterdir()) == sorted(FORMS)


@pytest.mark.parametrize("title", ["two turns", "a system prompt"])
@pytest.mark.parametrize("name", FORMS)
def test_words_and_their_end_are_trained_to_the_character(name: str, title: str) -> None:
    words = [turn["content"] for turn in CHATS[title]["messages"] if turn["role"] == "assistant"]
    assert trained(name, title) == FORMS[name].answers(words)


@pytest.mark.parametrize(("name", "title"), ALL)
def test_every_trained_run_is_ended_once(name: str, title: str) -> None:
    form, made = FORMS[name], masked.document(name, title)
    assert (
        len(made.ends) == len(trained(name, title)) == sum(t["role"] == "assistant" for t in CHATS[title]["messages"])
    )
    assert [sum(run.count(end) for end in {form.end, form.last} - {""}) for run in trained(name, title)] == [
        1 for _ in made.ends
    ]
    assert (made.end_twice, made.turns["unended"]) == (False, 0)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if "a tool call" in form.chats])
def test_a_call_is_trained_and_its_schema_and_result_are_not(name: str) -> None:
    call, answer = trained(name, "a tool call")
    assert ('"add"' in call, call.endswith(FORMS[name].end), answer.lstrip().endswith(f"Five.{FORMS[name].end}")) == (
        True, True, True,
    )  # fmt: skip
    assert "5" not in call
    assert "object" not in call + answer, "the schema"


@pytest.mark.parametrize("words", ["", "I add.", "<think>\nTo add or not to add?\n</think>\n\nI add."])
def test_a_form_that_knows_no_tools_refuses_calls_instead_of_training_silence(words: str) -> None:
    encoder, _ = masked.encoder("phi4")
    turns = [{**turn, "content": words} if "tool_calls" in turn else turn for turn in TURNS]
    [said] = encoder.documents([Shaped("chats").row(1, {"messages": turns})])
    assert isinstance(said, str)
    assert "does not write the tool call add of turn 2" in said


@pytest.mark.parametrize("words", ["add", '{"name": "add", "arguments": {"a": 2, "b": 3}}', "I add.\nadd"])
@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3"])
def test_words_that_are_the_call_itself_are_no_reason_to_refuse_it(name: str, words: str) -> None:
    turns = [{**turn, "content": words} if "tool_calls" in turn else turn for turn in TURNS]
    *called, answer = runs(name, turns)
    assert '"add"' in "".join(called)
    assert "Five." in answer
    encoder, _ = masked.encoder("phi4")  # which writes the words alone
    [said] = encoder.documents([Shaped("chats").row(1, {"messages": turns})])
    assert "does not write the tool call add of turn 2" in str(said)


def test_a_second_call_that_is_left_out_is_refused_though_the_first_has_its_name_in_the_arguments() -> None:
    call = {"name": "add", "arguments": {"a": "add"}}
    encoder, _ = masked.encoder("llama3")
    turns = [TURNS[0], {"role": "assistant", "tool_calls": [call, call]}]
    [said] = encoder.documents([Shaped("chats").row(1, {"messages": turns})])
    assert "does not write the tool call add of turn 2" in str(said)


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "qwen3"])
def test_arguments_that_came_as_text_are_written_as_those_that_came_as_an_object(name: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    turns = [{**turn, "tool_calls": [call]} if "tool_calls" in turn else turn for turn in TURNS]
    assert runs(name, turns) == trained(name, "a tool call")


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3"])
def test_calls_of_two_turns_in_a_row_are_trained_as_one_turn_that_ends_once(name: str) -> None:
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    both, answer = runs(name, [TURNS[0], call, call, *TURNS[2:]])
    assert (both.count('"add"'), both.count(FORMS[name].end), both.endswith(FORMS[name].end)) == (2, 1, True)
    assert "Five." in answer


def test_calls_of_two_turns_stay_two_turns_where_the_form_writes_one_call_a_turn() -> None:
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    first, second, answer = runs("llama3", [TURNS[0], call, call, *TURNS[2:]])
    assert first == second == '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'
    assert "Five." in answer


@pytest.mark.parametrize(("name", "apart"), [("qwen3", 0), ("hermes", 1), ("llama3", 1), ("mistral", 1)])
def test_words_and_the_call_after_them_are_one_turn_where_the_form_writes_both_and_else_two(
    name: str, apart: int
) -> None:
    said = {"role": "assistant", "content": "I look it up."}
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    for words in ("I look it up.", "add"):  # the latter stands in the call too
        *turns, _ = "".join(runs(name, [TURNS[0], {**said, "content": words}, call, *TURNS[2:]])).split(FORMS[name].end)
        assert len(turns) == 2 + apart
        assert turns[0].lstrip().startswith(words)
        assert '"add"' in turns[apart]


def test_a_call_and_words_of_unlike_loss_are_refused_where_the_form_makes_one_turn_of_them() -> None:
    said = {"role": "assistant", "content": "I look it up.", "loss": False}
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    record = {"messages": [TURNS[0], said, call, *TURNS[2:]]}
    one, two = (masked.encoder(name)[0].documents([Shaped("chats").row(1, record)])[0] for name in ("qwen3", "hermes"))
    assert "give both the same loss" in str(one)
    assert isinstance(two, Document)
    assert two.turns[Turn.SILENT] == 1


def test_a_second_call_of_one_turn_that_the_form_does_not_write_is_refused() -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    encoder, _ = masked.encoder("llama3")
    turns = [TURNS[0], {"role": "assistant", "tool_calls": [call, call]}]
    [said] = encoder.documents([Shaped("chats").row(1, {"messages": turns})])
    assert "does not write the tool call add of turn 2" in str(said)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_words_before_a_call_are_trained_with_it(name: str) -> None:
    """Forms in which a turn is found by writing another one in its place."""
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "" if name == "mistral" else "I add."
    more = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Done."}
    call, *others = runs(name, [*turns, *more])
    assert len(others) == 2
    assert (turns[1]["content"] in call, '"add"' in call, call.endswith(FORMS[name].end)) == (True, True, True)


@pytest.mark.parametrize(
    ("name", "thoughts", "beside"), [("chatml", 0, 1), ("deepseek", 2, 1), ("qwen3", 1, 1), ("harmony", 0, 1)]
)
def test_turns_that_the_form_writes_without_their_thoughts_are_counted(name: str, thoughts: int, beside: int) -> None:
    """Thoughts inside of the words, and in a key of their own, which none of these forms reads."""
    encoder, _ = masked.encoder(name)
    record = chat("Two and two?", "Four.", "Three?", "Five.")
    record["messages"][1]["reasoning_content"] = "two, then two more"
    inside, apart, without = encoder.documents(
        [Shaped("chats").row(1, each) for each in (CHATS["thoughts"], record, CHATS["two turns"])]
    )
    assert isinstance(inside, Document)
    assert isinstance(apart, Document)
    assert isinstance(without, Document)
    assert [each.turns[Turn.SHORTENED] for each in (inside, apart, without)] == [thoughts, beside, 0]
    assert [each.turns[Turn.TRAINED] for each in (inside, apart, without)] == [2, 2, 2]


@pytest.mark.parametrize("thoughts", ["<think>one more</think>Five.", "<think>\none more\n\n</think>\n\n\nFive."])
def test_thoughts_that_the_form_writes_with_other_white_space_are_whole(thoughts: str) -> None:
    encoder, _ = masked.encoder("qwen3")
    [made] = encoder.documents([Shaped("chats").row(1, chat("Three?", thoughts))])
    assert isinstance(made, Document)
    assert made.turns == {Turn.TRAINED: 1, Turn.OTHERS: 1}


def test_of_thoughts_those_that_the_form_keeps_are_trained() -> None:
    kept = {name: [("two, then" in run, "one more" in run) for run in trained(name, "thoughts")]
            for name, form in FORMS.items() if "thoughts" in form.chats}  # fmt: skip
    assert kept == {
        "chatml": [(True, False), (False, True)],
        "deepseek": [(False, False), (False, False)],
        "qwen3": [(False, False), (False, True)],
    }
