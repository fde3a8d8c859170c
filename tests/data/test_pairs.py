"""A pair is two documents side by side in one window, its answers trained and its prompt not, however it is cut."""

from __future__ import annotations

import pickle
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft.data.inspect import main as inspect
from hpcft.data.kinds import Kind
from hpcft.data.prepare import prepare
from hpcft.data.report import table
from hpcft.data.shards import Prepared, Window, open_prepared
from hpcft.data.tokenizer import load
from hpcft.errors import Refusal
from hpcft.plan.plan import Source
from tests.data.conftest import Preparing, Tokenizers
from tests.data.small import EOS, request, write_lines
from tests.plans import plan

BOTH = [int(Kind.CHOSEN), int(Kind.REJECTED)]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


PAIRS = [pair(f"what is {n} ?", "two " * (n % 5 + 1), "and " * (n % 3 + 1), margin=n / 4) for n in range(40)]
RATED = [{"prompt": f"what is {n} ?", "completion": "two " * (n % 5 + 1), "label": n % 3 == 0} for n in range(40)]
LONG = pair("what do you say about it ? " * 4, "two and " * 20 + "four", "the answer " * 10 + "five")


def split(window: Window) -> list[tuple[list[int], list[bool]]]:
    """(tokens, trained) of every document."""
    ends = np.cumsum(window.documents).tolist()
    pieces = [slice(end - length, end) for end, length in zip(ends, window.documents, strict=True)]
    return [(window.tokens[piece].tolist(), window.trained[piece].tolist()) for piece in pieces]


def texts(shards: Prepared, folder: Path, index: int = 0) -> list[tuple[str, str]]:
    """(all, trained) of every document of a window, as text."""
    decode = load(request(tokenizer=folder), folder).decode
    pieces = split(shards.train[index])
    return [(decode(tokens), decode(list(compress(tokens, trained)))) for tokens, trained in pieces]


def written(prompt: str, answer: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def test_a_pair_becomes_its_chosen_and_its_rejected_document_with_the_answers_trained(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    shards = prepared([pair("what ?", "two", "and four", margin=0.5)], rows="pair")
    assert texts(shards, tokenizer()) == [
        (written("what ?", "two"), "two<|im_end|>"),
        (written("what ?", "and four"), "and four<|im_end|>"),
    ]
    window = shards.train[0]
    assert (window.kinds, window.margins) == (BOTH, [0.5, 0.5])


TEMPLATES = ["chatml", "llama3", "mistral", "gemma", "thinking", "opened_thought", "tools"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_what_the_assistant_says_after_the_common_turns_is_trained_in_any_template(
    template: str, prepared: Preparing, tokenizer: Tokenizers
) -> None:
    asked, said = {"role": "user", "content": "what ?"}, {"role": "assistant", "content": "hello"}
    prompt = [asked, said, {**asked, "content": "and you ?"}]
    record = {"prompt": prompt, "chosen": [{**said, "content": "two"}], "rejected": [{**said, "content": "four"}]}
    found = texts(prepared([record], template, rows="pair", train_on="all"), tokenizer(template))
    assert [trained.strip() for _, trained in found] == [f"two{EOS[template]}", f"four{EOS[template]}"]


def test_answers_of_several_turns_are_trained_where_the_assistant_speaks(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    turns = [[{"role": "assistant", "content": word}, {"role": "user", "content": "and ?"}] for word in ("two", "four")]
    last = {"role": "assistant", "content": "you"}
    record = {"prompt": "what ?", "chosen": [*turns[0], last], "rejected": [*turns[1], last]}
    found = texts(prepared([record], rows="pair", train_on="last_turn"), tokenizer())
    assert [trained for _, trained in found] == ["two<|im_end|>you<|im_end|>", "four<|im_end|>you<|im_end|>"]


def test_of_a_rated_record_the_last_answer_is_trained_and_its_kind_is_its_label(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    turns = [("user", "what ?"), ("assistant", "hello"), ("user", "and ?"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    records = [{"messages": messages, "label": label} for label in (True, False)]
    shards = prepared(records, rows="rated", packing=False)
    assert [window.kinds for window in shards.train] == [[Kind.DESIRABLE], [Kind.UNDESIRABLE]]
    assert [texts(shards, tokenizer(), n)[0][1] for n in (0, 1)] == ["two<|im_end|>"] * 2


@pytest.mark.parametrize("packing", [True, False])
def test_every_window_holds_whole_pairs_the_rejected_right_after_the_chosen(packing: bool, prepared: Preparing) -> None:
    shards = prepared(PAIRS, rows="pair", max_length=120, packing=packing)
    margins = []
    for index, window in enumerate(shards.train):
        pairs = len(window.documents) // 2
        assert window.kinds == BOTH * pairs
        assert len(window.tokens) <= 120
        assert shards.train.count(index, BOTH) == 2 * pairs
        assert shards.train.count(index, {Kind.CHOSEN}) == pairs
        assert shards.train.count(index, (Kind.CHAT, Kind.DESIRABLE)) == 0
        assert window.margins[::2] == window.margins[1::2]
        assert all(shards.train.origin(a) == shards.train.origin(a + 1) for a in shards.train.documents(index)[::2])
        margins += window.margins[::2]
    assert sorted(margins) == [n / 4 for n in range(40)]
    assert len(shards.train) == 40 if not packing else len(shards.train) < 30
    facts = shards.manifest["splits"]["train"]
    assert (facts["rows"], facts["kinds"]) == (40, {"chosen": 40, "rejected": 40})
    assert facts["tokens"] == sum(len(window.tokens) for window in shards.train)


def test_windows_sent_to_another_process_still_have_their_kinds(prepared: Preparing) -> None:
    windows = prepared(RATED, rows="rated", max_length=64).train
    again = pickle.loads(pickle.dumps(windows))
    assert [window.kinds for window in again] == [window.kinds for window in windows]
    assert sum(windows.count(n, [Kind.DESIRABLE]) for n in range(len(windows))) == 14


def test_chat_rows_have_the_kind_zero_and_no_margin(prepared: Preparing) -> None:
    window = prepared([{"query": "what ?", "response": "two"}]).train[0]
    assert (window.kinds, window.margins) == ([Kind.CHAT], [0.0])


def test_a_pair_longer_than_a_window_is_dropped_and_counted_with_both_lengths(prepared: Preparing) -> None:
    audit = prepared([*PAIRS, LONG], rows="pair", max_length=120).manifest["audit"]
    assert (audit["rows"]["too_long"], audit["dropped"]) == (1, {"too long": 1})
    assert "tokens in both answers with their prompts" in audit["examples"]["too long"][0][2]


def test_cut_on_the_left_both_answers_stay_whole_behind_the_same_rest_of_the_prompt(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    whole, cut = (prepared([LONG], rows="pair", max_length=n, truncation="truncate_left").train[0] for n in (512, 101))
    assert len(cut.tokens) in (100, 101)
    for (tokens, trained), (part, part_trained) in zip(split(whole), split(cut), strict=True):
        assert tokens[-len(part) :] == part
        assert trained[-len(part) :] == part_trained
        assert sum(part_trained) == sum(trained)
    prompts = [[t for t, is_trained in zip(*both, strict=True) if not is_trained] for both in split(cut)]
    assert prompts[0] == prompts[1]


def test_cut_on_the_right_the_longer_answer_is_cut_first(prepared: Preparing) -> None:
    whole, cut, more = (
        prepared([LONG], rows="pair", max_length=n, truncation="truncate_right").train[0] for n in (512, 150, 136)
    )
    for part in (cut, more):
        assert all(t[: len(p)] == p for (t, _), (p, _) in zip(split(whole), split(part), strict=True))
    assert cut.documents == [150 - whole.documents[1], whole.documents[1]]
    assert more.documents == [68, 68]


@pytest.mark.parametrize(
    ("record", "policy", "why"),
    [
        (pair("what ?", "two", "two"), "drop", "the chosen answer and the rejected one are equal"),
        (pair("what ?", " ", "two"), "drop", "chosen answer: the assistant's words are empty"),
        (pair("what ?", "two", ""), "drop", "rejected answer: the assistant's words are empty"),
        (pair("what ? " * 20, "two", "four"), "truncate_right", "for both answers cuts off all that would be trained"),
        (pair("what ?", "two " * 100, "four"), "truncate_left", "for both answers cuts off the whole prompt"),
        (pair("what ?", "two " * 60, "two " * 61), "truncate_right", "for both answers leaves them equal"),
    ],
)
def test_a_pair_from_which_nothing_is_learned_is_dropped_counted_and_refused_when_many(
    record: dict[str, Any], policy: str, why: str, prepared: Preparing
) -> None:
    changes = {"rows": "pair", "max_length": 80, "truncation": policy}
    audit = prepared([*PAIRS[:9], record], **changes).manifest["audit"]
    assert audit["rows"]["untrained"] == 1
    assert [reason for reason in audit["dropped"] if why in reason], audit["dropped"]
    with pytest.raises(Refusal, match=r"2 of 2 rows \(100%\) have no token to train on") as refusal:
        prepared([record] * 2, **changes)
    assert refusal.value.problems[1].where.endswith("rows.jsonl:1")
    assert why in refusal.value.problems[1].what
    assert ("raise max_length: 80 cuts them" in refusal.value.problems[0].hint) == (policy != "drop")


def test_answers_that_the_template_writes_alike_are_said_to_be_equal_as_written(prepared: Preparing) -> None:
    """They differ in the thoughts of a turn that is not the last, which the template drops."""
    more = [{"role": "user", "content": "and ?"}, {"role": "assistant", "content": "you"}]
    both = [
        [{"role": "assistant", "content": f"<think>\n{word}\n</think>\n\nfour"}, *more] for word in ("two", "three")
    ]
    record = {"prompt": "what ?", "chosen": both[0], "rejected": both[1]}
    dropped = prepared([*PAIRS[:9], record], "thinking", rows="pair").manifest["audit"]["dropped"]
    assert list(dropped) == ["the chosen answer and the rejected one are equal as the template writes them"]
    dropped = prepared([*PAIRS[:9], pair("what ?", "two", "two")], rows="pair").manifest["audit"]["dropped"]
    assert list(dropped) == ["the chosen answer and the rejected one are equal"]


def test_a_negative_margin_is_no_class(prepared: Preparing) -> None:
    shards = prepared([{**pair("what ?", "two", "three"), "margin": -1.5}], rows="pair")
    assert (shards.train[0].margins, shards.manifest["classes"]) == ([-1.5, -1.5], {"names": []})


def test_the_validation_split_takes_whole_pairs_and_equal_ones_together(prepared: Preparing) -> None:
    shards = prepared([*PAIRS, *PAIRS[:10]], rows="pair", validation_ratio=0.2, packing=False)
    assert shards.validation is not None
    sides = [{tuple(window.tokens.tolist()) for window in side} for side in (shards.train, shards.validation)]
    assert not sides[0] & sides[1]
    assert all(window.kinds == BOTH for side in (shards.train, shards.validation) for window in side)
    assert shards.manifest["audit"]["duplicates"] + shards.manifest["audit"]["held_duplicates"] == 10


@pytest.mark.parametrize("rows", ["pair", "rated"])
def test_answers_to_one_prompt_go_to_the_same_side_of_the_split(rows: str, prepared: Preparing) -> None:
    records: list[Any] = [pair(f"what is {n % 20} ?", f"two {n}", "four") for n in range(60)]
    if rows == "rated":
        records = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2} for n, r in enumerate(records)]
    shards = prepared(records, rows=rows, validation_ratio=0.2, packing=False)
    assert shards.validation is not None
    assert len(shards.validation) == 12
    sides = [
        {tuple(window.tokens[: window.trained.argmax()].tolist()) for window in side}
        for side in (shards.train, shards.validation)
    ]
    assert (len(sides[0]), len(sides[1]), len(sides[0] & sides[1])) == (16, 4, 0)
    assert shards.manifest["audit"]["prompts"] == 0


def test_pairs_of_a_validation_file_that_are_in_train_too_are_counted(tmp_path: Path, tokenizer: Tokenizers) -> None:
    others = [{**PAIRS[5], "chosen": "other"}, pair("who ?", "you", "they")]
    train, held = write_lines(tmp_path / "a.jsonl", PAIRS), write_lines(tmp_path / "v.jsonl", [*PAIRS[:3], *others])
    data = request(train, tokenizer=tokenizer(), rows="pair", validation=(Source(path=str(held)),))
    manifest = prepare(data, tmp_path / "store").manifest
    assert (manifest["audit"]["overlap"], manifest["audit"]["prompts"]) == (3, 4)
    assert "whose prompt is in train and in validation  1" in table(manifest, ["a.jsonl", "v.jsonl"])


def test_the_audit_counts_kinds_and_shows_answers_that_are_longer(prepared: Preparing) -> None:
    shards = prepared([pair(f"what is {n} ?", "two and four " * 5, "you") for n in range(4)], rows="pair")
    kinds = shards.manifest["audit"]["kinds"]
    assert kinds["chosen"]["documents"] == kinds["rejected"]["documents"] == 4
    assert kinds["chosen"]["mean_trained"] > kinds["rejected"]["mean_trained"] == 2.0
    shown = table(shards.manifest, ["a.jsonl"])
    assert "rejected  4 of 2 trained tokens in the mean" in shown
    head, row = shown[: shown.index("\ntokens of a pair")].splitlines()[-2:]
    assert (head.split()[-3], row.split()[4]) == ("pairs", "4")
    assert "times as long as rejected ones" in shown


@pytest.mark.parametrize("label", [True, False])
def test_the_audit_warns_of_rated_answers_that_are_all_of_one_kind(label: bool, prepared: Preparing) -> None:
    warning = f"warning: every answer is {'desirable' if label else 'undesirable'}, so there is nothing to tell it from"
    assert warning in table(prepared([record | {"label": label} for record in RATED], rows="rated").manifest, ["a"])
    assert "every answer is" not in table(prepared(RATED, rows="rated").manifest, ["a"])


def test_two_workers_write_the_same_bytes_of_pairs_as_one(tmp_path: Path, tokenizer: Tokenizers) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIRS * 8)
    folders = [
        prepare(request(path, tokenizer=tokenizer(), rows="pair", workers=workers), tmp_path / str(workers)).folder
        for workers in (1, 2)
    ]
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
    assert len(first["train.margins.bin"]) == 4 * len(first["train.kinds.bin"]) == 4 * 640


def test_inspect_shows_both_answers_of_a_pair_with_their_trained_tokens(
    tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("what ?", "two", "four", margin=2)])
    data = request(path, tokenizer=tokenizer(), rows="pair")
    prepare(data, tmp_path / "store")
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    assert inspect(["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert "a.jsonl:1 · pair · chosen · margin 2 · " in shown
    assert "a.jsonl:1 · pair · rejected · margin 2 · " in shown
    assert shown.index("⟦two<|im_end|>⟧") < shown.index("⟦four<|im_end|>⟧")


@pytest.mark.parametrize(("name", "rows", "kinds"), [("dpo_en_demo", "pair", (1, 2)), ("kto_en_demo", "rated", (3, 4))])
def test_the_real_preference_records_keep_every_row(
    name: str, rows: str, kinds: tuple[int, int], real_data: Path, tmp_path: Path, tokenizer: Tokenizers
) -> None:
    path = real_data / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = request(Source(path=str(path), rows=60), tokenizer=tokenizer(), rows=rows, max_length=32768)
    prepare(data, tmp_path / "store")
    shards = open_prepared(tmp_path / "store", data)
    assert shards.manifest["audit"]["rows"]["kept"] == 60
    counts = [sum(shards.train.count(n, [kind]) for n in range(len(shards.train))) for kind in kinds]
    assert sum(counts) == (120 if rows == "pair" else 60)
    assert min(counts) > 0
