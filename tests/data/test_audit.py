"""The audit tells what is trained and why not, how turns end, how long records are; a picture is beside the shards."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft.data import histogram, stops
from hpcft.data.prepare import prepare
from hpcft.data.report import reported, table
from hpcft.data.shards import Prepared
from hpcft.data.statistics import spread
from hpcft.data.tokenizer import load
from hpcft.plan.plan import Source
from tests.data.conftest import Preparing, Tokenizers
from tests.data.small import chat, request, write_lines, write_tokenizer

ROWS = [chat(f"what is {n} ?", "the answer is " + "and two " * (n % 7) + str(n)) for n in range(40)]


def shown(shards: Prepared) -> str:
    return table(shards.manifest, ["rows.jsonl"])


def test_every_turn_is_counted_with_why_it_is_not_trained(prepared: Preparing) -> None:
    record = chat("a", "one", "b", "two", "c", " ", "d", "four")
    record["messages"][1]["loss"] = False
    record["messages"].insert(0, {"role": "system", "content": "be brief"})
    turns = prepared([record]).manifest["audit"]["turns"]
    assert turns == {"trained": 2, "silent": 1, "empty": 1, "others": 5}
    turns = prepared([record], train_on="last_turn").manifest["audit"]["turns"]
    assert turns == {"trained": 1, "silent": 1, "earlier": 1, "empty": 1, "others": 5}
    turns = prepared([record], train_on="all").manifest["audit"]["turns"]
    assert turns == {"trained": 8, "silent": 1}
    assert "not trained: loss is false  1" in shown(prepared([record], train_on="all"))


def test_an_answer_that_spells_its_own_end_token_is_found_for_it_would_end_twice(prepared: Preparing) -> None:
    shards = prepared([*ROWS[:3], chat("what ?", "two<|im_end|>")])
    assert shards.manifest["audit"]["rows"]["end_twice"] == 1
    assert "in 1 rows the end token stands twice" in shown(shards)
    assert prepared(ROWS[:3], "two_ends").manifest["audit"]["rows"]["end_twice"] == 0


def test_thoughts_that_the_template_drops_are_told_once_with_a_count(prepared: Preparing) -> None:
    rows = [*ROWS[:3], chat("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd")]
    shards = prepared(rows, "thinking")
    assert shards.manifest["audit"]["turns"]["shortened"] == 1
    assert shown(shards).count("the template leaves a part out of 1 of 5 trained turns") == 1
    last = prepared(rows, "thinking", train_on="last_turn")
    assert "shortened" not in last.manifest["audit"]["turns"]
    opened = prepared([chat("a", "<think>\none\n</think>\n\nb")], "opened_thought")
    assert "shortened" not in opened.manifest["audit"]["turns"]


def test_tools_that_the_template_does_not_write_are_told(prepared: Preparing) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for template, rows in (("chatml", 2), ("tools", 0)):
        shards = prepared([*ROWS[:3], *({**row, "tools": tools} for row in ROWS[3:5])], template)
        assert shards.manifest["audit"]["rows"]["tools_unwritten"] == rows
        assert ("2 rows have tools, which the template does not write" in shown(shards)) == bool(rows)


def test_many_rows_that_are_too_long_are_warned_of(prepared: Preparing) -> None:
    long = chat("what ?", "two " * 100)
    assert "2 of 5 rows are longer than max_length and dropped" in shown(
        prepared([*ROWS[:3], long, long], max_length=64)
    )
    assert "longer than max_length and dropped" not in shown(prepared([*ROWS[:4], long], max_length=64))


def test_turns_that_nothing_ends_are_told(prepared: Preparing, tmp_path: Path) -> None:
    """A template that ends its turns with a line break teaches no model to stop but after the last one."""
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    shards = prepared([chat("a", "one", "b", "two")], chat_template=str(template))
    assert shards.manifest["audit"]["turns"]["unended"] == 1
    assert "1 trained turns are closed by no end token" in shown(shards)


def test_an_end_that_truncation_cuts_off_is_no_longer_counted_as_one(prepared: Preparing) -> None:
    long = chat("what ?", "two and " * 60)
    cut = prepared([ROWS[0], long], max_length=90, truncation="truncate_right").manifest["audit"]
    assert (cut["end_token"]["turns"], cut["rows"]["end_cut"], cut["rows"]["truncated"]) == (1, 1, 1)
    kept = prepared([ROWS[0], long], max_length=90, truncation="truncate_left").manifest["audit"]
    assert (kept["end_token"]["turns"], kept["rows"]["end_cut"], kept["rows"]["truncated"]) == (2, 0, 1)
    assert cut["tokens_cut"] == kept["tokens_cut"] == cut["row_tokens"]["longest"] - 90


def test_equal_rows_are_counted_apart_in_train_and_in_validation_and_across(
    tmp_path: Path, tokenizer: Tokenizers
) -> None:
    train, held = ([*ROWS[:6], *ROWS[:2]], [*ROWS[4:9], ROWS[8]])
    paths = [write_lines(tmp_path / name, rows) for name, rows in (("a.jsonl", train), ("v.jsonl", held))]
    data = request(paths[0], tokenizer=tokenizer(), validation=(Source(path=str(paths[1])),))
    answer = prepare(data, tmp_path / "store")
    audit = answer.manifest["audit"]
    assert (audit["duplicates"], audit["held_duplicates"], audit["overlap"]) == (2, 1, 2)
    told = table(answer.manifest, answer.names)
    assert "equal to an earlier row of train       2" in told
    assert "in train and in validation             2" in told


@pytest.mark.parametrize("packing", [True, False])
def test_the_table_has_the_lengths_of_the_records_in_the_windows(prepared: Preparing, packing: bool) -> None:
    shards = prepared(ROWS, max_length=90, packing=packing)
    lengths = np.array([n for window in shards.train for n in window.documents])
    facts = shards.manifest["statistics"]["train"]
    assert facts["records"] == 40
    assert facts["tokens"] == {
        "sum": lengths.sum(), "mean": round(lengths.mean(), 1), "p50": int(np.quantile(lengths, 0.5, method="nearest")),
        "p90": int(np.quantile(lengths, 0.9, method="nearest")), "p99": lengths.max(), "max": lengths.max(),
    }  # fmt: skip
    assert facts["trained"]["sum"] == shards.manifest["splits"]["train"]["trained_tokens"]
    row = next(line for line in shown(shards).splitlines() if line.startswith("  train, trained"))
    assert row.split()[2:] == [f"{facts['trained']['mean']:,.0f}", *(str(facts["trained"][q]) for q in PS)]


PS = ("p50", "p90", "p99", "max")


def test_a_pair_is_one_record_and_a_repeated_one_counts_each_time(tmp_path: Path, tokenizer: Tokenizers) -> None:
    rows = [{"prompt": "what ?", "chosen": "two", "rejected": "three and four"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = request(Source(path=str(path), rows=3), tokenizer=tokenizer(), rows="pair")
    manifest = prepare(data, tmp_path / "store").manifest
    facts = manifest["statistics"]["train"]
    assert (facts["records"], facts["tokens"]["sum"]) == (3, manifest["splits"]["train"]["tokens"])
    assert facts["tokens"]["max"] * 3 == facts["tokens"]["sum"]


def test_rows_with_arguments_that_are_no_object_are_kept_counted_and_warned_of_once(
    prepared: Preparing, tokenizer: Tokenizers
) -> None:
    texts = ["{'a': 1}", '{"a": 1', '{"a": 1}']
    rows = [
        {
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "messages": [
                {"role": "user", "content": f"what {n} ?"},
                {"role": "assistant", "tool_calls": [{"name": "add", "arguments": text}]},
            ],
        }
        for n, text in enumerate(texts)
    ]
    shards = prepared(rows, "tools")
    counts = shards.manifest["audit"]["rows"]
    assert (counts["kept"], counts["arguments_text"]) == (3, 2)
    assert shown(shards).count("warning: in 2 rows the arguments of a call are no JSON object") == 1
    decode = load(request(tokenizer=tokenizer("tools")), tokenizer("tools")).decode
    assert "{'a': 1}" in "".join(decode(window.tokens) for window in shards.train)
    assert "arguments of a call" not in shown(prepared(rows[2:], "tools"))


def test_no_numbers_at_all_have_no_quantiles() -> None:
    assert set(spread(np.empty(0, np.int64)).values()) == {0}


def test_the_picture_is_drawn_once_beside_the_shards(tmp_path: Path, tokenizer: Tokenizers) -> None:
    pytest.importorskip("matplotlib")
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer(), validation_ratio=0.2)
    answer = prepare(data, tmp_path / "store")
    assert f"histogram of the lengths: {answer.folder / histogram.NAME}" in reported(data, answer)
    picture = answer.folder / histogram.NAME
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (width, height) == (880, 770), "two panels"
    assert [path.name for path in answer.folder.iterdir() if path.name.startswith(".")] == []
    drawn = picture.stat().st_mtime_ns
    reported(data, answer)
    assert picture.stat().st_mtime_ns == drawn


@pytest.mark.parametrize("fault", ["no library", "read-only"])
def test_without_a_picture_the_data_is_good_all_the_same(
    fault: str, tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer())
    answer = prepare(data, tmp_path / "store")
    if fault == "no library":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr(histogram, "draw", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    said = reported(data, answer).splitlines()[-1]
    assert said.startswith("no histogram of the lengths: ")
    assert ("pip install matplotlib" in said) == (fault == "no library")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"generation_config.json": {"eos_token_id": ["END", 0]}}, "generation stops at <|im_end|> (id 2) and id 0"),
        ({"generation_config.json": {"eos_token_id": 0}}, "stops generation at id 0, not at <|im_end|>"),
        ({"config.json": {"eos_token_id": "END"}}, "generation stops at <|im_end|> (id 2), says config.json"),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": None}}, "does not say where generation stops"),
        ({}, "does not say where generation stops"),
    ],
)
def test_where_generation_stops_is_compared_with_what_ends_the_turns(
    files: dict[str, dict[str, Any]], says: str, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path / "model")
    data = request(write_lines(tmp_path / "a.jsonl", ROWS[:3]), tokenizer=folder)
    answer = prepare(data, tmp_path / "store")
    assert answer.manifest["audit"]["end_token"]["id"] == 2
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values).replace('"END"', "2"))
    [sentence] = stops.compared(answer.manifest["audit"], folder)
    assert says in sentence
