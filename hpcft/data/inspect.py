"""Show what is trained: windows of the prepared data as text, with the trained tokens marked.

python -m hpcft.data.inspect --plan runs/x/plan.json --store prepared --random 3
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hpcft.data import tokenizer as tokenizers
from hpcft.data.kinds import Kind
from hpcft.data.prepare import names_of
from hpcft.data.shards import Prepared, Windows, open_prepared
from hpcft.data.store import Answer
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan, Plan

COLOURED = ("\033[1;32m", "\033[0m")
BRACKETED = ("⟦", "⟧")


def described(prepared: Prepared, split: str, index: int, tokenizer: Any, marks: tuple[str, str]) -> Iterator[str]:
    """Lines about window ``index`` of ``split``: its numbers, then each document's source and marked text."""
    windows = windows_of(prepared, split)
    window = windows[index]
    trained = int(window.trained.sum())
    yield (
        f"{split} window {index} of {len(windows):,} · documents: {len(window.documents)} · tokens: "
        f"{len(window.tokens):,} · trained: {trained:,} ({trained / len(window.tokens):.0%})"
    )
    names = names_of(Answer(Path(prepared.content), prepared.manifest, prepared.inputs))
    start = 0
    documents = zip(windows.documents(index), window.documents, window.kinds, window.margins, strict=True)
    for number, length, kind, margin in documents:
        file, line = windows.origin(number)
        piece = slice(start, start + length)
        shape = prepared.manifest["files"][file]["shape"]
        what = "" if kind == Kind.CHAT else f" · {Kind(kind).word}" + (f" · margin {margin:g}" if margin else "")
        trained = int(window.trained[piece].sum())
        yield f"\n── {names[file]}:{line} · {shape}{what} · {length:,} tokens, {trained:,} trained"
        yield marked(window.tokens[piece].tolist(), window.trained[piece].tolist(), tokenizer, marks)
        start += length


def marked(tokens: Sequence[int], trained: Sequence[bool], tokenizer: Any, marks: tuple[str, str]) -> str:
    """The text of ``tokens`` with every run of trained ones between ``marks``; control characters are spelt out."""
    pieces = []
    for is_trained, run in groupby(zip(tokens, trained, strict=True), key=lambda pair: bool(pair[1])):
        text = tokenizer.decode(
            [token for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        pieces.append(f"{marks[0]}{text}{marks[1]}" if is_trained else text)
    return "".join(pieces)


def windows_of(prepared: Prepared, split: str) -> Windows:
    """The windows of a split. Raises Refusal where the data has none of that name."""
    windows = {"train": prepared.train, "validation": prepared.validation}.get(split)
    if windows is None:
        splits = [name for name, there in (("train", True), ("validation", prepared.validation)) if there]
        raise refuse("the prepared data has no such split", where="--split", value=split, choices=splits)
    return windows


def chosen(windows: Windows, index: int | None, how_many: int | None) -> list[int]:
    """The windows to show. Raises Refusal where ``index`` is outside."""
    if how_many is not None:
        return sorted(random.sample(range(len(windows)), min(how_many, len(windows))))
    index = index or 0
    if not -len(windows) <= index < len(windows):
        raise refuse("no such window", where="--index", value=index, choices=[f"0 … {len(windows) - 1}"])
    return [index % len(windows)]


def show(data: DataPlan, store: Path, split: str, index: int | None, how_many: int | None) -> None:
    """Print the chosen windows. Raises Refusal."""
    prepared = open_prepared(store, data)
    indices = chosen(windows_of(prepared, split), index, how_many)
    tokenizer = tokenizers.load(data, tokenizers.folder_of(data))
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number in indices:
        print("\n".join(described(prepared, split, number, tokenizer, COLOURED if coloured else BRACKETED)), end="\n\n")
    mark = "bold green" if coloured else " … ".join(BRACKETED)
    print(f"{mark}: these tokens carry loss", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process ``python -m hpcft.data.inspect``; 0, or 2 with the reasons on stderr."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.data.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, type=Path, help="the run's plan.json")
    parser.add_argument("--store", required=True, type=Path, help="the folder of prepared data")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="the window to show; the first when absent")
    which.add_argument("--random", type=int, metavar="N", help="show N windows taken at random")
    parser.add_argument("--split", default="train", help="train or validation")
    given = parser.parse_args(arguments)
    try:
        data = Plan.from_json(given.plan.read_text(encoding="utf-8"), str(given.plan)).data
        show(data, given.store, given.split, given.index, given.random)
    except Refusal as refusal:
        print(refusal.report, file=sys.stderr)
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
