"""Records of JSON, JSONL, CSV and Parquet files, one after another, each with the line it stands on.

The text kinds may be gzipped.
JSON is parsed plainly, never through Arrow's type inference, which would fail on tool schemas of unlike shapes.
Every fault of a file is a Refusal that names file and line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hpcft.data import broken, nulls
from hpcft.data.broken import CUT_OFF, LFS
from hpcft.errors import Refusal, near_file, refuse

Records = Iterator[tuple[int, Any]]
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def records(path: Path, shown: str) -> Records:
    """(line, record) of every record; for Parquet, line is the row's number. ``shown``: the path as a person wrote it.

    Raises Refusal where the file is missing, a folder, of an unknown kind, empty, or broken somewhere.
    """
    read = READERS[kind_of(path, shown)]
    found = False
    for pair in read(path, shown):
        found = True
        yield pair
    if not found:
        raise refuse("this file has no records", where=shown, hint="is it the right file? `wc -c` shows its size")


def kind_of(path: Path, shown: str) -> str:
    """The extension that says how to read ``path``. Raises Refusal where it is not a file that can be read."""
    if path.is_dir():
        inside = sorted(str(p.relative_to(path)) for p in path.rglob("*") if kind_by_name(p) in READERS)[:5]
        hint = f"name the files, for example {shown.rstrip('/')}/{inside[0]}" if inside else "it holds no data files"
        raise refuse("this is a folder, not a data file", where=shown, hint=hint)
    if not path.is_file():
        raise missing(path, shown)
    kind = kind_by_name(path)
    if kind in READERS:
        return kind
    hint = "unpack it once, beside the original" if kind in PACKED else ""
    value = "".join(path.suffixes[-2:]) or "no extension"
    raise refuse("unknown kind of data file", where=shown, value=value, choices=READERS, hint=hint)


def kind_by_name(path: Path) -> str:
    """The extension that says how to read a file, ``.gz`` aside where it may be there; Parquet packs itself."""
    inner = Path(path.stem).suffix.lower()
    return inner if path.suffix.lower() == ".gz" and inner in READERS and inner != ".parquet" else path.suffix.lower()


def missing(path: Path, shown: str) -> Refusal:
    """The refusal of a file that is not there, naming a near neighbour."""
    folder = path.parent
    if not folder.is_dir():
        return refuse("no such file: its folder does not exist either", where=shown, value=folder)
    there = [p.name for p in folder.iterdir() if kind_by_name(p) in READERS]
    close = near_file(path.name, there)
    hint = f"did you mean {folder / close}?" if close else f"data files there: {', '.join(sorted(there)[:5]) or 'none'}"
    return refuse("no such file", where=shown, hint=hint)


def _json(path: Path, shown: str) -> Records:
    """A list of records or one record per line, told by the first character: people mix the two names up."""
    return _array(path, shown) if _starts(path, shown) == b"[" else _lines(path, shown)


def _starts(path: Path, shown: str) -> bytes:
    with _opened(path, shown) as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1]


def is_lines(path: Path, shown: str) -> bool:
    """Whether every record stands on a line of its own in bytes that can be read from any place on."""
    return READERS[kind_of(path, shown)] is _json and path.suffix.lower() != ".gz" and _starts(path, shown) != b"["


def stretch(path: Path, shown: str, start: int, end: int, line: int) -> Records:
    """The records in bytes ``start`` … ``end`` of a file of lines (``is_lines``), the first of which is ``line``."""
    with _opened(path, shown) as file:
        file.seek(start)
        content = io.BytesIO(file.read(end - start))
    return _parsed(_numbered(content, shown, line), shown)


def _lines(path: Path, shown: str) -> Records:
    return _parsed(_decoded(path, shown), shown)


def _parsed(lines: Iterable[tuple[int, str]], shown: str) -> Records:
    for line, text in lines:
        if text.strip():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _broken_json(error, text.rstrip("\r\n"), shown, line) from error


def _array(path: Path, shown: str) -> Records:
    """The records of one JSON list; the file is held in memory, the records are not."""
    text = _whole(path, shown)
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"\s*")
    at, line, seen = _skip(space, text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        try:
            record, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _broken_json(error, text, shown, line, seen) from error
        yield line, record
        at = _skip(space, text, end)
        line, seen = line + text.count("\n", seen, at), at
        if text[at : at + 1] == ",":
            at = _skip(space, text, at + 1)
            if text[at : at + 1] == "]":
                raise refuse(
                    "a comma before the closing bracket", where=f"{shown}:{line}", hint="remove the last comma"
                )
        elif text[at : at + 1] != "]":
            raise refuse(
                "the list of records ends in the middle" if at >= len(text) else "a comma or ] is missing here",
                where=f"{shown}:{line}",
                value=text[max(0, at - 40) : at + 40],
                hint=CUT_OFF if at >= len(text) else "records in a list are parted by commas",
            )
    if rest := text[at + 1 :].strip():
        raise refuse("something follows the list of records", where=f"{shown}:{line}", value=rest[:80])


def _skip(space: re.Pattern[str], text: str, at: int) -> int:
    found = space.match(text, at)
    return found.end() if found else at


def _broken_json(error: Exception, text: str, shown: str, line: int, start: int = 0) -> Refusal:
    hint = broken.hint(error, text, start)
    if not isinstance(error, json.JSONDecodeError):
        return refuse(f"broken JSON: {error}", where=f"{shown}:{line}", value=text[start : start + 80], hint=hint)
    at = min(error.pos, len(text))  # json counts an end of line that ``text`` may be without
    column = at - text.rfind("\n", 0, at)
    piece = text[max(start, at - 40) : at + 40].strip("\r\n")
    line += text.count("\n", start, at)
    return refuse(f"broken JSON: {error.msg} (column {column})", where=f"{shown}:{line}", value=piece, hint=hint)


def _csv(path: Path, shown: str) -> Records:
    csv.field_size_limit(sys.maxsize)
    lines = (text for _, text in _decoded(path, shown))
    reader = csv.reader(lines, delimiter="\t" if kind_by_name(path) == ".tsv" else ",", strict=True)
    header = _csv_row(reader, shown)
    if header is None:
        return
    if ",".join(header).lstrip()[:1] in ("{", "["):
        raise refuse("this is JSON, not CSV", where=f"{shown}:1", value=header[0], hint="rename the file to .jsonl")
    if len(set(header)) < len(header) or not all(header) or not header:
        what, hint = "the header has an empty or a repeated name", "the first line names the columns"
        raise refuse(what, where=f"{shown}:1", value=",".join(header), hint=hint)
    line = reader.line_num + 1
    while (row := _csv_row(reader, shown)) is not None:
        if row and len(row) != len(header):
            raise refuse(
                f"this row has {len(row)} fields, the header {len(header)}",
                where=f"{shown}:{line}",
                value=",".join(row)[:80],
                hint="quote fields that hold commas or line breaks",
            )
        if row:
            yield line, dict(zip(header, row, strict=True))
        line = reader.line_num + 1


def _csv_row(reader: Any, shown: str) -> list[str] | None:
    try:
        row: list[str] | None = next(reader, None)
        return row
    except csv.Error as error:
        hint = "quote the field, and double the quotes inside it"
        raise refuse(f"broken CSV: {error}", where=f"{shown}:{reader.line_num}", hint=hint) from error


def _parquet(path: Path, shown: str) -> Records:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise refuse("reading Parquet needs pyarrow", where=shown, hint="pip install pyarrow") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            filled = nulls.may_be_filled(file.schema_arrow)
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    row += 1
                    yield row, nulls.without(record) if filled else record
    except (arrow.ArrowException, OSError) as error:
        where = f"{shown}:{row + 1}" if row else shown
        with path.open("rb") as file:
            hint = "it is Git LFS's pointer: git lfs pull" if file.read(len(LFS)) == LFS.encode() else CUT_OFF
        raise refuse(f"not a whole Parquet file: {error}", where=where, hint=hint) from error


def _decoded(path: Path, shown: str) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, its line ending kept (CSV fields may hold line breaks), a BOM taken away."""
    with _opened(path, shown) as file:
        yield from _numbered(file, shown, 1)


def _numbered(file: IO[bytes], shown: str, first: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, first):
        yield number, _utf8(line.removeprefix(BOM) if number == 1 else line, shown, number)


def _whole(path: Path, shown: str) -> str:
    with _opened(path, shown) as file:
        return _utf8(file.read().removeprefix(BOM), shown, 1)


@contextlib.contextmanager
def _opened(path: Path, shown: str) -> Iterator[IO[bytes]]:
    """The bytes of ``path``, unpacked on the way where it is gzipped."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise refuse(f"not a whole gzip file: {error}", where=shown, hint=f"{CUT_OFF} gzip -t tells") from error
    except PermissionError as error:
        raise refuse("this file may not be read", where=shown, hint=f"ls -l {shown}") from error


def _utf8(content: bytes, shown: str, line: int) -> str:
    """``content``, which begins on ``line``, as text."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        piece = content[max(0, error.start - 20) : error.start + 20]
        hint = "it is UTF-16" if content.startswith(UTF16) else "it may be Latin-1, GBK or another older encoding"
        raise refuse(
            f"not UTF-8: {error.reason} 0x{content[error.start]:02x}",
            where=f"{shown}:{line}",
            value=piece.decode(errors="replace"),
            hint=f"{hint}; convert it: iconv -f OLD -t UTF-8 {shown} > new{path_suffix(shown)}",
        ) from error


def path_suffix(shown: str) -> str:
    """The extension of a path as shown."""
    return Path(shown).suffix


PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz")
READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
