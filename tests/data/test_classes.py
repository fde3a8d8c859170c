"""Labels become classes: found in the data, numbered the same way each time, refused with file and line where wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.data.classes import MOST, found
from hpcft.data.prepare import main, prepare
from hpcft.data.report import table
from hpcft.data.shards import Prepared
from hpcft.data.tokenizer import load
from hpcft.errors import Refusal
from hpcft.plan.plan import Source
from tests.data.conftest import Preparing, Tokenizers
from tests.data.small import chat, request, write_lines
from tests.plans import plan

TEXTS = [{"text": f"the answer is {n}", "label": ("neutral", "good", "bad")[n % 3]} for n in range(12)]


def labelled(prepared: Preparing, records: list[Any], **changes: Any) -> Prepared:
    return prepared(records, rows="labelled", **changes)


def classes_of(shards: Prepared) -> list[tuple[str, str]]:
    """(text, class) of every document, from what is written on disk."""
    folder = next(Path(entry.path).parent for entry in shards.inputs if entry.kind == "tokenizer")
    tokenizer = load(request(tokenizer=folder), folder)
    pairs = []
    for window in shards.train:
        start = 0
        for length, number in zip(window.documents, window.margins, strict=True):
            pairs.append((tokenizer.decode(window.tokens[start : start + length]), shards.classes[int(number)]))
            start += length
    return pairs


@pytest.mark.parametrize("packing", [True, False])
def test_every_text_is_written_with_its_own_class_and_nothing_added(prepared: Preparing, packing: bool) -> None:
    shards = labelled(prepared, TEXTS, packing=packing, template=None)
    assert shards.classes == ("bad", "good", "neutral"), "in the order of the alphabet"
    begin = "<|begin_of_text|>" if classes_of(shards)[0][0].startswith("<|begin") else ""
    assert sorted(classes_of(shards)) == sorted((begin + row["text"], row["label"]) for row in TEXTS)
    assert shards.manifest["classes"]["train"] == [4, 4, 4]


def test_of_a_text_the_last_token_alone_is_trained_however_it_is_cut(prepared: Preparing) -> None:
    long = {"text": "two and " * 60, "label": "good"}
    for policy in ("truncate_left", "truncate_right"):
        shards = labelled(prepared, [*TEXTS, long], max_length=20, truncation=policy, packing=False)
        assert max(len(window.tokens) for window in shards.train) == 20
        assert all(window.trained.tolist() == [False] * (len(window.tokens) - 1) + [True] for window in shards.train)
        assert shards.manifest["audit"]["rows"]["truncated"] == 1


def test_a_chat_is_what_its_template_writes_of_any_length(prepared: Preparing, tokenizer: Tokenizers) -> None:
    records = [{**chat("what ?", "two"), "label": 0}, {**chat("and ?"), "label": 1}]
    shards = labelled(prepared, records, packing=False)
    assert [text for text, _ in classes_of(shards)] == [
        "<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
        "<|im_start|>user\nand ?<|im_end|>\n",
    ]
    assert shards.classes == ("LABEL_0", "LABEL_1")


def test_a_template_is_wanted_for_chats_and_not_for_texts(prepared: Preparing) -> None:
    assert len(labelled(prepared, TEXTS, template=None).train) > 0
    with pytest.raises(Refusal, match="no chat template"):
        labelled(prepared, [{**chat("a"), "label": n} for n in range(2)], template=None)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"query": "what ?", "label": 1}, "user: what ?"),
        ({"instruction": "what", "input": "is it", "label": 1}, "user: what\nis it"),
        ({"question": "what ?", "answer": "two", "label": 1}, "user: what ?assistant: two"),
        ({"conversations": [{"from": "human", "value": "what ?"}], "label": 1}, "user: what ?"),
        ({"messages": [{"role": "user", "content": "what ?"}], "label": "1"}, "user: what ?"),
    ],
)
def test_records_in_other_spellings_are_the_turns_they_mean(
    record: dict[str, Any], text: str, prepared: Preparing, tmp_path: Path
) -> None:
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    shards = labelled(
        prepared, [record, {**record, "label": 0}], chat_template=str(tmp_path / "plain.jinja"), packing=False
    )
    assert classes_of(shards) == [(text, "LABEL_1"), (text, "LABEL_0")]


def test_numbers_keep_their_value_in_any_spelling_and_may_leave_classes_out(prepared: Preparing) -> None:
    shards = labelled(prepared, [{"text": f"text {label}", "label": label} for label in (3, "1", 0, 3.0)])
    assert shards.classes == tuple(f"LABEL_{n}" for n in range(4))
    assert shards.manifest["classes"]["train"] == [1, 1, 0, 2]
    assert "1 of 4 classes have no record in train: LABEL_2" in table(shards.manifest, ["a"])


def test_a_text_that_says_the_same_stays_on_one_side_of_the_split_whatever_its_label(prepared: Preparing) -> None:
    rows = [{"text": f"text {n // 2}", "label": n % 2} for n in range(40)]
    shards = labelled(prepared, rows, validation_ratio=0.3)
    audit = shards.manifest["audit"]
    assert (audit["duplicates"], audit["held_duplicates"], audit["overlap"], audit["prompts"]) == (0, 0, 0, 0)
    assert shards.manifest["classes"]["validation"] == [6, 6]


def test_validation_knows_the_classes_of_train(tmp_path: Path, tokenizer: Tokenizers) -> None:
    held = write_lines(tmp_path / "v.jsonl", [{"text": "one more", "label": "unheard"}])
    train = write_lines(tmp_path / "a.jsonl", TEXTS)
    data = request(train, tokenizer=tokenizer(), validation=(Source(path=str(held)),), rows="labelled")
    manifest = prepare(data, tmp_path / "store").manifest
    assert manifest["classes"]["names"] == ["bad", "good", "neutral", "unheard"]
    assert "1 of 4 classes have no record in train: unheard" in table(manifest, ["a", "v"])


def test_a_class_that_is_nearly_all_is_noted(prepared: Preparing) -> None:
    rows = [{"text": f"text {n}", "label": "spam" if n else "ham"} for n in range(10)]
    assert "spam is 90% of train" in table(labelled(prepared, rows).manifest, ["a"])


GOOD = {"text": "two and two", "label": "good"}
NUMBER = {"text": "two and two", "label": 1}
WRONG: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "no label": ([GOOD, {"text": "four"}], {}, ["a.jsonl:2: this record has the shape text"]),
    "none has a label": ([{"text": "four"}], {}, ["a.jsonl:1: this record has no label", "hint: ", "`label`"]),
    "null": ([GOOD, {"text": "a", "label": None}], {}, ["a.jsonl:2: `label` is null, which names no class"]),
    "empty": ([GOOD, {"text": "a", "label": " "}], {}, ['a.jsonl:2: `label` is " ", which names no class']),
    "half": ([GOOD, {"text": "a", "label": 0.5}], {}, ["a.jsonl:2: `label` is 0.5", "its number from 0 on"]),
    "negative": ([{"text": "a", "label": -1}], {}, ["a.jsonl:1: `label` is -1"]),
    "several": ([GOOD, {"text": "a", "label": [0, 1]}], {}, ["a.jsonl:2: `label` is [0, 1]", "gives a text one class"]),
    "an object": ([{"text": "a", "label": {"a": 1}}], {}, ["a.jsonl:1: `label` is {", "gives a text one class"]),
    "name after number": ([NUMBER, GOOD], {}, ["a.jsonl:2: this label is a name, the first one", "value: good"]),
    "number after name": ([GOOD, NUMBER], {}, ["a.jsonl:2: this label is a number", "every one by number"]),
    "all the same": ([GOOD, GOOD], {}, ["all records have the same label", "value: good"]),
    "too high": ([NUMBER, {"text": "a", "label": 0}, {"text": "b", "label": 2}], {"num_labels": 2},
                 ["a.jsonl:3: the label is too high: the classes are 0 … 1", "value: 2", "num_labels"]),
    "far too high": ([NUMBER, {"text": "b", "label": 70_000}], {}, ["a.jsonl:2: the label is too", "without gaps"]),
    "more names": (TEXTS, {"num_labels": 2}, ["num_labels: the data has 3 labels", "valid: bad, good, neutral"]),
    "fewer names": (TEXTS, {"num_labels": 4}, ["num_labels: the data has 3 labels", "hint: num_labels: 3"]),
    "half of a pair": ([{"text": "a", "label": "\ud83d"}], {}, ["a.jsonl:1: `label` holds half of a UTF-16 pair"]),
    "a text": ([{"text": f"{n}", "label": f"a text {n}"} for n in range(MOST + 5)], {},
               [f"a.jsonl:{MOST + 1}: more than 4,096 labels", "is it a text here?"]),
    "a pair": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, ["a.jsonl:1: ", "as a record of its own"]),
    "only a tag": ([{**chat("a", "b"), "kto_tag": True}], {}, ["a.jsonl:1: this record has no label", "under `label`"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_label_is_refused_with_file_line_and_value(
    fault: str, tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    records, changes, sentences = WRONG[fault]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = request(tmp_path / "a.jsonl", tokenizer=tokenizer(), rows="labelled", **changes)
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    assert main(["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]) == 2
    told = capsys.readouterr()
    assert (told.out, "Traceback" in told.err) == ("", False)
    for sentence in sentences:
        assert sentence in told.err
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_other_runs_do_not_take_a_text_for_a_labelled_one(prepared: Preparing) -> None:
    shards = prepared(TEXTS)
    assert shards.manifest["files"][0]["shape"] == "text"
    assert (shards.classes, shards.manifest["files"][0]["unread"]) == ((), {"label": 12})


def test_no_labels_are_no_classes() -> None:
    assert found([("a.jsonl", {})], 0).names == ()
