"""Every kind of data file is read with its lines; every broken one is refused with file, line and piece."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.catalog import DATA_FILES
from hpcft.data.files import READERS, records
from hpcft.errors import Refusal

ROWS = [{"text": "one"}, {"text": "two, 二"}, {"text": "three\nlines"}]


def read(path: Path) -> list[tuple[int, Any]]:
    return list(records(path, path.name))


def refused(path: Path) -> str:
    with pytest.raises(Refusal) as refusal:
        read(path)
    assert refusal.value.exit_code == 2
    return str(refusal.value)


def test_a_record_a_line_is_read_with_its_line_whatever_the_line_endings_and_the_bom(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    content = "\ufeff" + lines[0] + "\r\n\r\n" + lines[1] + "\r\n" + lines[2]
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    assert read(tmp_path / "a.jsonl") == [(1, ROWS[0]), (3, ROWS[1]), (4, ROWS[2])]


def test_a_json_list_is_read_with_the_line_each_record_begins_on(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    assert read(tmp_path / "a.json") == [(2, ROWS[0]), (5, ROWS[1]), (8, ROWS[2])]


def test_list_and_lines_are_told_by_content_not_by_extension(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert [row for _, row in read(tmp_path / "list.jsonl")] == ROWS
    assert [line for line, _ in read(tmp_path / "lines.json")] == [1, 2, 3]


def test_csv_fields_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,completion\r\n"a, ""b""","two\nlines"\r\nc,d\r\n'.encode())
    assert read(tmp_path / "a.csv") == [
        (2, {"prompt": 'a, "b"', "completion": "two\nlines"}),
        (4, {"prompt": "c", "completion": "d"}),
    ]


def test_tab_separated_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    assert read(tmp_path / "a.tsv") == [(2, {"prompt": "a, b", "completion": "c"})]


def test_parquet_rows_are_read_nested_and_numbered(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "二"}]}, {"messages": []}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, rows[0]), (2, rows[1])]


def test_of_tools_and_their_calls_in_parquet_the_nulls_of_other_rows_are_left_out(tmp_path: Path) -> None:
    """A column has one type, so Arrow gives each call the arguments of all functions. Elsewhere a null is a null."""
    import pyarrow as arrow
    from pyarrow import parquet

    def record(name: str, **arguments: Any) -> dict[str, Any]:
        properties = {key: {"type": "string", "enum": ["a", None]} for key in arguments}
        call = {"function": {"name": name, "arguments": arguments}}
        turns = [{"content": "a", "tool_calls": None}, {"content": None, "tool_calls": [call]}]
        return {"tools": [{"name": name, "parameters": properties}], "messages": turns, "id": None}

    rows = [record("add", a=2), record("weather", city="Rome", at={"hour": 3})]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == rows


def test_a_gzipped_file_is_read_like_its_inside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert [row for _, row in read(tmp_path / "a.jsonl.gz")] == ROWS


def _utf8_broken_in_line_2(path: Path) -> None:
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    "a record cut off": ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', ["a.jsonl:2: broken JSON", '{"text": "b']),
    "a trailing comma in a record": ("a.jsonl", b'{"text": "a",}\n', ["a.jsonl:1: broken JSON", "trailing comma"]),
    "single quotes": ("a.jsonl", b"{'text': 'a'}\n", ["a.jsonl:1: broken JSON", "double quotes"]),
    "one object over many lines": ("a.json", b'{\n  "text": "a"\n}\n', ["a.json:1: broken JSON", "a list"]),
    "a comma before the bracket": ("a.json", b'[\n{"text": "a"},\n]', ["a.json:2: a comma before", "remove"]),
    "a list without commas": ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', ["a.json:3: a comma or ] is missing"]),
    "a list cut off": ("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n', ["ends in the middle", "cut off"]),
    "a list cut off after a comma": ("a.json", b'[\n{"text": "a"},\n', ["a.json:3: broken JSON"]),
    "a broken record in a list": ("a.json", b'[\n{"text": "a"},\n{"text":\n "b" "c"}]', ["a.json:4: broken JSON"]),
    "two lists": ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', ["a.json:1: something follows"]),
    "old encoding": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', ["a.jsonl:2: not UTF-8", "0xe9", "iconv"]),
    "old encoding in a list": ("a.json", b'[\n{"text": "a"},\n{"text": "\xb0\xa1"}]', ["a.json:3: not UTF-8"]),
    "UTF-16": ("a.json", "[1]".encode("utf-16"), ["a.json:1: not UTF-8", "it is UTF-16"]),
    "old encoding in CSV": ("a.csv", b"text\nfine\ncaf\xe9\n", ["a.csv:3: not UTF-8"]),
    "a CSV row too long": ("a.csv", b"text\n1\n1,2,3\n", ["a.csv:3: this row has 3 fields, the header 1", "quote"]),
    "a CSV quote never closed": ("a.csv", b'a,b\n"1,2\n3,4\n', ["a.csv:3: broken CSV"]),
    "a CSV header that is blank": ("a.csv", b"\na,b\n", ["a.csv:1: the header has an empty"]),
    "a CSV header with a name twice": ("a.csv", b"a,a\n1,2\n", ["a.csv:1: the header", "a,a"]),
    "not a Parquet file": ("a.parquet", b"PAR1 no", ["a.parquet: not a whole Parquet file"]),
    "not a gzip file": ("a.jsonl.gz", b"{}", ["a.jsonl.gz: not a whole gzip file"]),
    "a gzip file cut off": ("a.csv.gz", gzip.compress(b"text\n" * 999)[:-9], ["a.csv.gz: not a whole gzip file"]),
    "an empty file": ("a.jsonl", b"", ["a.jsonl: this file has no records"]),
    "an empty list": ("a.json", b"[ ]", ["a.json: this file has no records"]),
    "a CSV header alone": ("a.csv", b"a,b\n", ["a.csv: this file has no records"]),
    "another compression": ("a.jsonl.zst", b"x", ["unknown kind of data file", ".jsonl.zst", "unpack"]),
    "another kind": ("a.xlsx", b"x", ["unknown kind of data file", ".xlsx", "valid: .jsonl"]),
    "nesting without end": ("a.jsonl", b'{"a":' + b"[" * 100_000, ["a.jsonl:1: broken JSON"]),
}


def test_the_command_line_knows_the_same_kinds_of_files() -> None:
    assert tuple(READERS) == DATA_FILES


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_by_line_with_the_piece(fault: str, tmp_path: Path) -> None:
    name, content, sentences = BROKEN[fault]
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert all(sentence in message for sentence in sentences), message


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('{"text": "a"', "the record ends in the middle: was the file cut off"),
        ('{"text"', "the record ends in the middle"),
        ('{"text": "a" "b": 1}', "a comma is missing here"),
        ('{"text": "she said "no""}', 'a quote inside a text is not written \\"'),
        ('{"text": "a\tb"}', "a tab \\t"),
        ('{"text": "a', "no quote ends this text"),
        ('{"text": "C:\\data"}', "a backslash is written"),
        ('{"text": "a"} {"text": "b"}', "one record a line"),
        ("{text: 1}", "keys stand in double quotes"),
        ('{"text" 1}', "a colon stands between"),
        ('{"text": True}', "JSON spells True true"),
        ('{"text": , "b": 1}', "a value is missing here"),
        ("hello", "is this a file of records?"),
        ('{"text": ' + "9" * 5000 + "}", "write a number of so many digits as a text"),
        ('{"text":' + "[" * 100_000, "no record nests so deeply"),
    ],
)
def test_a_broken_line_is_refused_with_what_to_do_about_it(line: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    message = refused(tmp_path / "a.jsonl")
    assert "a.jsonl:2: broken JSON" in message
    assert hint in message.partition("hint: ")[2], message


def test_a_missing_file_names_its_near_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    assert "did you mean" in refused(tmp_path / "tran.jsonl")
    assert "data files there: train.jsonl" in refused(tmp_path / "held-out.jsonl"), "an extension makes none alike"
    assert "its folder does not exist" in refused(tmp_path / "nowhere" / "a.jsonl")


def test_a_folder_is_refused_with_a_file_inside_it(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("a\n")
    message = refused(tmp_path)
    assert "this is a folder" in message
    assert "/b.csv" in message


def test_records_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken\n')
    stream = records(tmp_path / "a.jsonl", "a.jsonl")
    assert next(stream) == (1, {"text": "a"})
    with pytest.raises(Refusal, match=r"a\.jsonl:2"):
        next(stream)
