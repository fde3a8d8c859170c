"""What is trained is what the assistant says and the token that ends it, whatever the chat template."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft.data.masks import Masker
from hpcft.data.shards import Prepared
from hpcft.data.tokenizer import Template, load
from hpcft.errors import Refusal
from tests.data.conftest import Preparing, Tokenizers
from tests.data.small import EOS, TEMPLATES, chat, request

TWO_TURNS = chat("What are two and two?", "Four, I say.", "And then?", "Four again: 四 🙂")


def trained_texts(shards: Prepared, folder: Any, index: int = 0) -> list[str]:
    """The text of every run of trained tokens in a window."""
    tokenizer = load(request(tokenizer=folder), folder)
    window = shards.train[index]
    runs = groupby(zip(window.tokens.tolist(), window.trained.tolist(), strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "thinking", "opened_thought", "tools", "dated"])
def test_the_assistants_words_and_their_end_token_are_trained_and_nothing_else(
    template: str, prepared: Preparing, tokenizer: Tokenizers
) -> None:
    end = EOS[template]
    shards = prepared([TWO_TURNS], template)
    assert trained_texts(shards, tokenizer(template)) == [f"Four, I say.{end}", f"Four again: 四 🙂{end}"]
    assert shards.manifest["audit"]["end_token"]["text"] == end
    assert shards.manifest["audit"]["end_token"]["turns"] == 2


def test_a_template_that_ignores_the_prompt_flag_and_moves_the_system_prompt_is_masked_all_the_same(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], "mistral", system="Be brief.")
    assert trained_texts(shards, tokenizer("mistral")) == [" Four, I say.</s>", " Four again: 四 🙂</s>"]


def test_thoughts_that_the_template_drops_from_earlier_turns_do_not_shift_the_mask(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    record = chat("Two?", "<think>\none, two\n</think>\n\nFour.", "And?", "<think>\nhm\n</think>\n\nFive.")
    trained = trained_texts(prepared([record], "thinking"), tokenizer("thinking"))
    assert trained == ["Four.<|im_end|>", "<think>\nhm\n</think>\n\nFive.<|im_end|>"]


def test_a_token_that_closes_only_the_whole_text_is_not_taken_for_the_end_of_a_turn(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], "phi")
    assert trained_texts(shards, tokenizer("phi")) == ["Four, I say.<|end|>", "Four again: 四 🙂<|end|>"]
    assert shards.manifest["audit"]["end_tokens"] == [
        {"id": shards.manifest["audit"]["end_token"]["id"], "text": "<|end|>", "turns": 2}
    ]


def test_a_turn_that_only_the_next_one_ends_is_ended_by_that_and_the_last_by_the_eos_token(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], "endless")
    assert trained_texts(shards, tokenizer("endless")) == ["Four, I say.<|user|>", "Four again: 四 🙂<|endoftext|>"]
    assert shards.manifest["audit"]["rows"]["end_added"] == 1


def test_end_tokens_side_by_side_are_both_trained(prepared: Preparing, tokenizer: Tokenizers) -> None:
    shards = prepared([TWO_TURNS], "two_ends")
    end = "<|end|><|im_end|>"
    assert trained_texts(shards, tokenizer("two_ends")) == [f"Four, I say.{end}", f"Four again: 四 🙂{end}"]
    assert shards.manifest["audit"]["end_token"]["text"] == "<|im_end|>"


def test_a_header_that_the_model_writes_itself_is_trained_in_every_turn(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], "channels")
    header = "<|start_header_id|>final<|end_header_id|>"
    assert trained_texts(shards, tokenizer("channels")) == [
        f"{header}Four, I say.<|end|>",
        f"{header}Four again: 四 🙂<|im_end|>",
    ]
    assert {end["text"] for end in shards.manifest["audit"]["end_tokens"]} == {"<|end|>", "<|im_end|>"}


def test_a_tool_call_is_trained_to_its_end_and_the_tools_answer_is_not(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    turns = [
        {"role": "user", "content": "two and two?"},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"role": "observation", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    record = {"messages": turns, "tools": [{"type": "function", "function": {"name": "add"}}]}
    call, answer = trained_texts(prepared([record], "tools"), tokenizer("tools"))
    assert call.startswith("<tool_call>{")
    assert call.endswith("</tool_call><|im_end|>")
    assert '"add"' in call
    assert answer == "Four.<|im_end|>"


def test_a_template_that_joins_arguments_to_text_gets_them_as_text(
    prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    said = "{{ '<|im_start|>' + m['role'] + ' ' + m['content'] }}"
    calls = "{% for call in m['tool_calls'] %}{{ '!' + call['function']['name'] + call['function']['arguments'] }}"
    opening = "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    template = tmp_path / "joining.jinja"
    template.write_text(f"{{% for m in messages %}}{said}{calls}{{% endfor %}}<|im_end|>{{% endfor %}}{opening}")
    asked = chat("two and two?")["messages"]
    for arguments, written in ({"a": 2, "b": "四"}, '{"a": 2, "b": "四"}'), ("{'a': 2}", "{'a': 2}"):
        turn = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": arguments}]}
        shards = prepared([{"messages": [*asked, turn]}], chat_template=str(template))
        assert trained_texts(shards, tokenizer()) == [f"!add{written}<|im_end|>"]


def test_only_what_follows_the_users_last_words_is_trained_with_last_turn(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], train_on="last_turn")
    assert trained_texts(shards, tokenizer()) == ["Four again: 四 🙂<|im_end|>"]


def test_every_token_but_a_documents_first_is_trained_with_all(prepared: Preparing) -> None:
    window = prepared([TWO_TURNS], train_on="all").train[0]
    assert not window.trained[0]
    assert window.trained[1:].all()


@pytest.mark.parametrize("flag", [{"loss": False}, {"train": False}, {"weight": 0}, {"loss_scale": 0.0}])
def test_a_turn_flagged_as_silent_is_not_trained(
    flag: dict[str, Any], prepared: Preparing, tokenizer: Tokenizers
) -> None:
    record = chat("Two?", "Four.", "And?", "Five.")
    record["messages"][1] |= flag
    assert trained_texts(prepared([record]), tokenizer()) == ["Five.<|im_end|>"]


def test_a_turn_flagged_as_silent_stays_so_when_all_is_trained(prepared: Preparing, tokenizer: Tokenizers) -> None:
    record = chat("Two?", "Four.", "And?", "Five.")
    record["messages"][1]["loss"] = False
    first, second = trained_texts(prepared([record], train_on="all"), tokenizer())
    assert first.endswith("assistant\n")
    assert second.startswith("\n<|im_start|>user\nAnd?")


def test_a_users_turn_flagged_for_training_is_trained(prepared: Preparing, tokenizer: Tokenizers) -> None:
    record = chat("Two?", "Four.")
    record["messages"][0]["loss"] = True
    assert trained_texts(prepared([record]), tokenizer()) == ["Two?", "Four.<|im_end|>"]


def test_raw_text_is_trained_from_its_second_token_to_the_eos_token(prepared: Preparing, tokenizer: Tokenizers) -> None:
    shards = prepared([{"text": "the answer is four"}], template=None)
    window = shards.train[0]
    assert window.trained.tolist() == [False] + [True] * (len(window.tokens) - 1)
    assert trained_texts(shards, tokenizer(None))[0].endswith("<|endoftext|>")


@pytest.mark.parametrize(("template", "turn"), [("shouting", r"2 \(assistant\)"), ("parts", r"1 \(user\)")])
def test_words_that_the_template_alters_or_drops_are_refused_by_row(
    template: str, turn: str, prepared: Preparing
) -> None:
    with pytest.raises(Refusal, match=rf"rows\.jsonl:1: .*turn {turn}"):
        prepared([TWO_TURNS], template)


WRITES = "{% for m in messages %}<|im_start|>{{ m.role }} {{ WORDS }}<|im_end|>{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("m.content if m.role != 'assistant'", "assistant"),
        ("m.content if m.role != 'system'", "system"),
        ("m.content if m.role != 'tool'", "tool"),
    ],
)
def test_a_turn_whose_words_the_template_leaves_out_is_refused_whoevers_it_is(
    words: str, role: str, prepared: Preparing, tmp_path: Path
) -> None:
    roles = ("system", "user", "assistant", "tool", "assistant")
    turns = [{"role": role, "content": f"words of {n}"} for n, role in enumerate(roles)]
    (tmp_path / "a.jinja").write_text(WRITES.replace("WORDS", words) + OPENING)
    for rows in ("rated", "labelled"):
        changes = {"chat_template": str(tmp_path / "a.jinja"), "rows": rows}
        records = [{"messages": turns, "label": label} for label in (0, 1)]
        with pytest.raises(Refusal, match=rf"rows\.jsonl:1: .*turn {roles.index(role) + 1} \({role}\)"):
            prepared(records, **changes)
    others = [turn for turn in turns if turn["role"] != role]
    prepared([{"messages": others, "label": label} for label in (0, 1)], **changes)


@pytest.mark.parametrize(
    ("dropped", "turns"),
    [
        ("tool", [("user", "Weather in Rome?"), ("tool", "22 degrees"), ("assistant", "It is 22 degrees.")]),
        ("tool", [("user", "Weather in Rome?"), ("tool", "Rome"), ("assistant", "Fine.")]),
        ("tool", [("user", "a"), ("tool", 'say "x"'), ("assistant", 'They say "x", "x"')]),
        ("system", [("system", "Rome"), ("user", "Weather in Rome, Rome?"), ("assistant", "Fine.")]),
    ],
)
def test_a_turn_that_is_left_out_is_refused_though_another_has_its_words(
    dropped: str, turns: list[tuple[str, str]], prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    (tmp_path / "a.jinja").write_text(WRITES.replace("WORDS", f"m.content if m.role != '{dropped}'") + OPENING)
    (tmp_path / "b.jinja").write_text(WRITES.replace("WORDS", "m.content") + OPENING)
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    number = [role for role, _ in turns].index(dropped) + 1
    with pytest.raises(Refusal, match=rf"does not write turn {number} \({dropped}\)"):
        prepared([record], chat_template=str(tmp_path / "a.jinja"))
    shards = prepared([record], chat_template=str(tmp_path / "b.jinja"))
    assert [text.strip() for text in trained_texts(shards, tokenizer())] == [f"{turns[-1][1]}<|im_end|>"]


def test_a_result_that_is_left_out_is_refused_though_the_call_has_its_words(
    prepared: Preparing, tmp_path: Path
) -> None:
    called = "m.content ~ (m.tool_calls[0].function | tojson if m.tool_calls else '')"
    for name, words in (("a", f"({called}) if m.role != 'tool'"), ("b", called)):
        (tmp_path / f"{name}.jinja").write_text(WRITES.replace("WORDS", words) + OPENING)
    call = {"role": "tool_call", "content": '{"name": "find", "arguments": {"city": "Rome"}}'}
    turns = [
        *chat("Where?")["messages"],
        call,
        {"role": "tool", "content": "Rome"},
        *chat("", "There.")["messages"][1:],
    ]
    with pytest.raises(Refusal, match=r"does not write turn 3 \(tool\)"):
        prepared([{"messages": turns}], chat_template=str(tmp_path / "a.jinja"))
    prepared([{"messages": turns}], chat_template=str(tmp_path / "b.jinja"))


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ("m.content | trim", "  4\n"),
        ("m.content | tojson", '{"sum": "4"}\n{"said": "四"}'),
        ("(m.content | tojson).replace('<', '&lt;')", 'a "<b>"'),
        ("m.content.replace('/no_think', '') | trim", "2 + 2? /no_think"),
        ("m.content.replace('/no_think', '') | trim", "/no_think"),
        ("m.content.replace('/no_think', '') | upper", "two /no_think"),
    ],
)
def test_a_turn_that_the_template_writes_in_its_own_way_is_no_reason_to_refuse_the_row(
    words: str, content: str, prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    template = WRITES.replace("WORDS", f"m.content if m.role == 'assistant' else {words}") + OPENING
    (tmp_path / "a.jinja").write_text(template)
    turns = [{"role": "system", "content": content}, *chat("2 + 2?", "Four.")["messages"]]
    turns += [{"role": "tool", "content": content}, {"role": "assistant", "content": "Five."}]
    shards = prepared([{"messages": turns}], chat_template=str(tmp_path / "a.jinja"))
    assert trained_texts(shards, tokenizer()) == ["Four.<|im_end|>", "Five.<|im_end|>"]


def test_what_a_developer_says_is_the_systems_where_the_template_knows_no_developer(
    prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    said = "{{ m.content if m.role != 'developer' else 'of a developer: ' ~ m.content }}"
    (tmp_path / "a.jinja").write_text(WRITES.replace("{{ WORDS }}", said) + OPENING)
    (tmp_path / "b.jinja").write_text(WRITES.replace("WORDS", "m.content") + OPENING + "{# or 'developer' #}")
    decode = load(request(tokenizer=tokenizer()), tokenizer()).decode
    for template, begins in (("a.jinja", "developer of a developer: Be"), ("b.jinja", "system Be brief.")):
        turns = [{"role": "developer", "content": "Be brief."}, *TWO_TURNS["messages"]]
        shards = prepared([{"messages": turns}], chat_template=str(tmp_path / template))
        assert decode(shards.train[0].tokens).startswith(f"<|im_start|>{begins}")


def test_a_row_that_the_template_refuses_is_named_with_the_templates_own_words(prepared: Preparing) -> None:
    rows = [chat("a", "b"), {"messages": [{"role": "system", "content": "x"}, *chat("a", "b")["messages"]]}]
    with pytest.raises(Refusal, match=r"rows\.jsonl:2: .*System role not supported"):
        prepared(rows, "gemma")


def test_a_conversation_needs_a_chat_template_and_says_how_to_give_one(prepared: Preparing) -> None:
    with pytest.raises(Refusal, match="no chat template") as refusal:
        prepared([TWO_TURNS], template=None)
    assert "chatml" in refusal.value.problems[0].choices
    prepared([TWO_TURNS], template=None, chat_template="chatml")


def test_the_built_in_chatml_is_refused_for_a_tokenizer_without_its_tokens(
    prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    for file in tokenizer(None).iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(Refusal, match=r"no token <\|im_end\|>"):
        prepared([TWO_TURNS], chat_template="chatml", tokenizer=str(tmp_path))


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([TWO_TURNS], "dated")
    text = load(request(tokenizer=tokenizer()), tokenizer()).decode(shards.train[0].tokens)
    assert text.startswith("Today is 26 Jul 2024.\n")
    assert shards.manifest["audit"]["fixed_date"] == "26 Jul 2024"


def test_the_date_is_written_as_the_template_asks_for_it(
    prepared: Preparing, tokenizer: Tokenizers, tmp_path: Path
) -> None:
    template = TEMPLATES["dated"].replace("%d %b %Y", "%Y-%m-%d', it is '%A")
    (tmp_path / "iso.jinja").write_text(template.replace("', it is '", "') }}, a {{ strftime_now('"))
    shards = prepared([TWO_TURNS], chat_template=str(tmp_path / "iso.jinja"))
    text = load(request(tokenizer=tokenizer()), tokenizer()).decode(shards.train[0].tokens)
    assert text.startswith("Today is 2024-07-26, a Friday.\n")


def test_a_template_file_may_lie_in_the_home_folder(
    prepared: Preparing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text(TEMPLATES["dated"])
    assert prepared([TWO_TURNS], chat_template="~/mine.jinja").manifest["audit"]["fixed_date"]


def test_tokens_are_those_of_the_whole_text(prepared: Preparing, tokenizer: Tokenizers) -> None:
    fast = load(request(tokenizer=tokenizer("llama3")), tokenizer("llama3"))
    whole = fast.apply_chat_template(TWO_TURNS["messages"], tokenize=True, return_dict=False)
    assert np.array_equal(prepared([TWO_TURNS], "llama3").train[0].tokens, whole)


def test_a_hundred_thousand_spaces_are_masked_in_no_time(prepared: Preparing) -> None:
    shards = prepared([chat("a" + " " * 100_000, "b" + " " * 100_000 + "c")], max_length=300_000)
    assert len(shards.train[0].tokens) > 200_000


def test_a_random_conversation_is_masked_alike_by_prefixes_and_by_substitution(tokenizer: Tokenizers) -> None:
    """Two independent ways to find the words agree, for words that try to look like the template's own."""
    import random

    draw = random.Random(3)
    pieces = ["user", "assistant\n", "\n", " ", "Four", "<think>", "四", "[/INST]", "{{ m }}", "model", "."]
    for template in ("chatml", "llama3", "gemma"):
        folder = tokenizer(template)
        fast = load(request(tokenizer=folder), folder)
        masker = Masker(Template(fast, request(tokenizer=folder)), [EOS[template]])
        for _ in range(20):
            turns = ["x" + "".join(draw.choices(pieces, k=5)) + "x" for _ in range(2 * draw.randint(1, 3))]
            messages = chat(*turns)["messages"]
            text, spans = masker.spans(messages, None)
            assert [text[s.start : s.end] for s in spans] == [turn + EOS[template] for turn in turns[1::2]]
            assert spans == [masker._substituted(text, messages, None, s.turn) for s in spans]


@pytest.mark.parametrize("template", sorted(EOS))
def test_texts_rendered_together_are_those_rendered_one_by_one(template: str, tokenizer: Tokenizers) -> None:
    folder = tokenizer(template)
    render = Template(load(request(tokenizer=folder), folder), request(tokenizer=folder))
    chats = [tuple(chat(*[f"say {n}" for n in range(turns)])["messages"]) for turns in (1, 2, 3, 4)]
    asked = [(turns, n) for turns in chats for n in range(1, len(turns) + 1)]
    for prompt in (False, True):
        for _ in range(2):  # the first time the short way is compared with the long one
            assert render.many(asked, prompt) == [render(turns[:n], None, prompt) for turns, n in asked]


def test_what_a_template_sets_for_one_text_is_not_set_for_the_next(tokenizer: Tokenizers, tmp_path: Path) -> None:
    said = "{{ '<|im_start|>' }}{{ seen | default('first') }}{{ messages[0]['content'] }}"
    template = tmp_path / "seen.jinja"
    template.write_text(said + "{% set seen = 'again' %}{% if add_generation_prompt %}{{ seen }}{% endif %}")
    data = request(tokenizer=tokenizer("chatml"), chat_template=str(template))
    render = Template(load(data, tokenizer("chatml")), data)
    asked = [(tuple(chat(words, "b")["messages"]), 2) for words in ("x", "y", "z")]
    for _ in range(2):
        assert render.many(asked, True) == [f"<|im_start|>first{words}again" for words in "xyz"]
    assert render.plain is not None, "the short way serves"
