"""Whatever a file holds, the answer is a refusal: what, where, the value or a hint; exit code 2, no traceback."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hpcft.data.prepare import main
from tests.data.conftest import Tokenizers
from tests.data.small import chat, request
from tests.data.test_files import BROKEN
from tests.plans import plan

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def turns(*contents: Any) -> bytes:
    return lines(GOOD, {"messages": list(contents)})


def zipped(name: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, content)
    return target.getvalue()


ASKED, SAID = GOOD["messages"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# What is wrong → file name, its bytes, the kind of row the run needs, what the refusal says.
MALFORMED: dict[str, tuple[str, bytes, str, list[str]]] = {
    **{fault: (name, content, "chat", sentences) for fault, (name, content, sentences) in BROKEN.items()},
    "a BOM and a broken line": ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text"\n', "chat", ["a.jsonl:2: broken JSON"]),
    "the end of a line": ("a.jsonl", b'{"text": "a"}\n{"text"\n', "chat", ["a.jsonl:2: broken JSON", "(column 8)"]),
    "a BOM alone": ("a.jsonl", b"\xef\xbb\xbf", "chat", ["a.jsonl: this file has no records"]),
    "blank lines alone": ("a.jsonl", b"\n \r\n\n", "chat", ["a.jsonl: this file has no records"]),
    "CRLF and a broken third line": ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text"\r\n', "chat", ["a.jsonl:3: broken"]),
    "zero bytes": ("a.jsonl", b'{"text": "a"}\n\0\0\0\0\n', "chat", ["a.jsonl:2: broken JSON", "\\x00"]),
    "a giant broken line": ("a.jsonl", b'{"text": "' + b"x" * 5_000_000, "chat", ["a.jsonl:1: broken JSON"]),
    "a number of too many digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "chat", ["a.jsonl:1: broken JSON"]),
    "nesting without end in a list": ("a.json", b'[{"a":' + b"[" * 100_000, "chat", ["a.json:1: broken JSON"]),
    "a page of a web server": ("a.jsonl", b"<!doctype html>\n<html>", "chat", ["a.jsonl:1: broken JSON", "<!doctype"]),
    "a Git LFS pointer": ("a.jsonl", LFS, "chat", ["a.jsonl:1: broken JSON", "git lfs pull"]),
    "a Git LFS pointer for Parquet": ("a.parquet", LFS, "chat", ["a.parquet: not a whole Parquet", "git lfs pull"]),
    "a text file": ("a.txt", b"hello", "chat", ["unknown kind of data file", ".txt", "valid: .jsonl"]),
    "no extension": ("data", b"{}", "chat", ["unknown kind of data file", "no extension"]),
    "gzip without saying so": ("a.jsonl", gzip.compress(b"{}"), "chat", ["a.jsonl:1: not UTF-8"]),
    "a zip that says JSONL": ("a.jsonl", zipped("a", b"{}" * 99), "chat", ["a.jsonl:1: "]),
    "a broken line in gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{'), "chat", ["a.jsonl.gz:2: broken JSON"]),
    "JSON lines that say CSV": ("a.csv", lines(GOOD, GOOD), "chat", ["a.csv:1: this is JSON", ".jsonl"]),
    "CSV that says JSON": ("a.json", b"prompt,completion\na,b\n", "chat", ["a.json:1: broken JSON"]),
    "a null record": ("a.jsonl", lines(GOOD, None), "chat", ["a.jsonl:2: a record must be an object", "None"]),
    "a record that is a text": ("a.jsonl", lines("a"), "chat", ["a.jsonl:1: a record must be an object"]),
    "everything under one key": ("a.json", lines({"data": [GOOD]}), "chat", ["a.json:1: no known shape", "data"]),
    "an escape in a key": ("a.jsonl", lines({"\x1b[2J": 1}), "chat", ["a.jsonl:1: no known shape", "\\x1b[2J"]),
    "messages that are null": ("a.jsonl", lines({"messages": None}), "chat", ["a.jsonl:1: `messages` holds no turns"]),
    "a turn that is null": ("a.jsonl", turns(ASKED, None), "chat", ["a.jsonl:2: turn 2 is null, not an object"]),
    "a role that is null": ("a.jsonl", turns({"role": None, "content": "a"}), "chat", ["turn 1 has the unknown role"]),
    "a turn without keys": ("a.jsonl", turns({}), "chat", ["a.jsonl:2: turn 1 has no role; its keys are none"]),
    "a part that is null": ("a.jsonl", turns({"role": "user", "content": [None]}), "chat", ["part of type null"]),
    "a call with nulls": ("a.jsonl", turns({"role": "tool_call", "content": "[null]"}), "chat", ["without a name"]),
    "half of a surrogate pair": ("a.jsonl", b'{"text": "\\ud83d"}\n', "chat", ["a.jsonl:1: `text` holds half"]),
    "empty turns everywhere": ("a.jsonl", lines(chat("", "")), "chat", ["a.jsonl:1: ", "words are empty"]),
    "no answer anywhere": ("a.jsonl", turns(ASKED)[len(lines(GOOD)) :], "chat", ["a.jsonl:1: no assistant turn"]),
    "tools that are no JSON": ("a.jsonl", lines({**GOOD, "tools": "add()"}), "chat", ["`tools` is a text that is not"]),
    "two shapes": ("a.jsonl", lines(GOOD, {"text": "a"}), "chat", ["a.jsonl:2: this record has the shape text"]),
    "a pair without its chosen answer": ("a.jsonl", lines(PAIR, {"prompt": "a", "rejected": "c"}), "pair", [
        "a.jsonl:2: no known shape", "nearest is pair, which needs chosen, prompt, rejected",
    ]),
    "a pair whose rejected answer is null": ("a.jsonl", lines(PAIR, {**PAIR, "rejected": None}), "pair", [
        "a.jsonl:2: `rejected` is null",
    ]),
    "pairs of equal answers": ("a.jsonl", lines({**PAIR, "rejected": "b"}), "pair", [
        "a.jsonl:1: the chosen answer and the rejected one are equal", "1 of 1 rows (100%)",
    ]),
    "pairs with an empty answer": ("a.jsonl", lines({**PAIR, "chosen": " "}), "pair", [
        "a.jsonl:1: chosen answer: the assistant's words are empty",
    ]),
    "a pair on two prompts": ("a.jsonl", lines({"chosen": [ASKED, SAID], "rejected": [SAID, ASKED]}), "pair", [
        "a.jsonl:1: there is no prompt",
    ]),
    "chats for a run of pairs": ("a.jsonl", lines(GOOD), "pair", ["a.jsonl:1: this record has no rejected answer"]),
    "pairs for a run of chats": ("a.jsonl", lines(PAIR), "chat", ["a.jsonl:1: this record is a prompt with a chosen"]),
    "a margin that is a word": ("a.jsonl", lines({**PAIR, "margin": "much"}), "pair", ["`margin` is a text"]),
    "a label that is a word": ("a.jsonl", lines({**GOOD, "label": True}, {**GOOD, "label": "fine"}), "rated", [
        'a.jsonl:2: `label` is "fine", neither true nor false', "true: a good answer",
    ]),
    "labels that are null": ("a.jsonl", lines({**GOOD, "kto_tag": None}), "rated", ["a.jsonl:1: `kto_tag` is null"]),
    "a CSV of pairs with a broken list": (
        "a.csv", b'prompt,chosen,rejected\na,"[{""role"": ""user"", ""content"": ""b""}]",c\n', "pair",
        ["a.csv:2: `chosen` is no answer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused_by_prepare(
    fault: str, tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, rows, sentences = MALFORMED[fault]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "plan.json").write_text(plan(data=request(tmp_path / name, tokenizer=tokenizer(), rows=rows)).to_json())
    words = ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    refusal = captured.err[captured.err.index("Error: ") :]
    assert all(sentence in refusal for sentence in sentences), refusal
    assert str(tmp_path / name) in refusal
    assert "  value: " in refusal or "  hint: " in refusal, refusal
    assert len(refusal) < 4000
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_there_are_more_than_fifty_of_them() -> None:
    assert len(MALFORMED) > 50


STRICT = """{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}
"""


def test_two_questions_in_a_row_are_refused_by_line_where_the_template_takes_none(
    tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(turns(ASKED, ASKED, SAID))
    (tmp_path / "strict.jinja").write_text(STRICT)
    data = request(tmp_path / "a.jsonl", tokenizer=tokenizer(), chat_template=str(tmp_path / "strict.jinja"))
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    assert main(["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]) == 2
    refusal = capsys.readouterr().err
    assert "a.jsonl:2: the chat template refuses this row: roles must alternate" in refusal
    assert "  hint: " in refusal
