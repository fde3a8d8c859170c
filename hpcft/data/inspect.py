"""Show what is trained: records or windows of the prepared data as text, with the trained tokens marked.

python -m hpcft.data.inspect --plan runs/x/plan.json --store prepared --random 3
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hpcft.data import tokenizer as tokenizers
from hpcft.data.kinds import Kind
from hpcft.data.shards import Prepared, Window, Windows, open_prepared
from hpcft.data.store import Answer
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan, Plan

COLOURED = ("\033[1;32m", "\033[0m")
BRACKETED = ("⟦", "⟧")


@dataclass(frozen=True)
class View:
    """What is looked at, and how trained tokens are marked."""

    prepared: Prepared
    split: str
    tokenizer: Any
    marks: tuple[str, str]

    @property
    def windows(self) -> Windows:
        return windows_of(self.prepared, self.split)


def window_shown(view: View, index: int) -> Iterator[str]:
    """Lines about window ``index``: its numbers, then its documents."""
    window = view.windows[index]
    trained = int(window.trained.sum())
    yield (
        f"{view.split} window {index} of {len(view.windows):,} · documents: {len(window.documents)} · tokens: "
        f"{len(window.tokens):,} · trained: {trained:,} ({trained / len(window.tokens):.0%})"
    )
    yield from _documents(view, window, view.windows.documents(index))


def record_shown(view: View, first: int) -> Iterator[str]:
    """Lines about the record that begins with document ``first``; of a pair both answers."""
    yield from _documents(view, view.windows.record(first), view.windows.record_documents(first))


def _documents(view: View, window: Window, numbers: Sequence[int]) -> Iterator[str]:
    """Each document's source and marked text. numbers: of those of ``window``."""
    prepared, windows = view.prepared, view.windows
    names = Answer(Path(prepared.content), prepared.manifest, prepared.inputs).names
    start = 0
    documents = zip(numbers, window.documents, window.kinds, window.margins, strict=True)
    for number, length, kind, margin in documents:
        file, line = windows.origin(number)
        piece = slice(start, start + length)
        shape = prepared.manifest["files"][file]["shape"]
        what = "" if kind == Kind.CHAT else f" · {Kind(kind).word}"
        if kind == Kind.LABELLED:
            what += f" {prepared.classes[int(margin)]}"
        elif margin:
            what += f" · margin {margin:g}"
        trained = int(window.trained[piece].sum())
        yield f"\n── {names[file]}:{line} · {shape}{what} · {length:,} tokens, {trained:,} trained"
        yield marked(window.tokens[piece].tolist(), window.trained[piece].tolist(), view.tokenizer, view.marks)
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


@dataclass(frozen=True)
class Wish:
    """What to show of a split: ``random`` records, or with ``windows`` windows, picked by ``seed``; else window
    ``index``."""

    split: str
    index: int = 0
    random: int | None = None
    seed: int = 0
    windows: bool = False


def chosen(windows: Windows, wish: Wish) -> list[int]:
    """The numbers of the windows to show, or of the records' first documents. Raises Refusal for one outside."""
    if wish.random is not None:
        all_there: Sequence[int] = range(len(windows)) if wish.windows else windows.firsts().tolist()
        return sorted(random.Random(wish.seed).sample(all_there, min(wish.random, len(all_there))))
    if not -len(windows) <= wish.index < len(windows):
        raise refuse("no such window", where="--index", value=wish.index, choices=[f"0 … {len(windows) - 1}"])
    return [wish.index % len(windows)]


def show(data: DataPlan, store: Path, wish: Wish) -> None:
    """Print what is wished for. Raises Refusal."""
    prepared = open_prepared(store, data)
    numbers = chosen(windows_of(prepared, wish.split), wish)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tokenizer = tokenizers.load(data, tokenizers.folder_of(data))
    view = View(prepared, wish.split, tokenizer, COLOURED if coloured else BRACKETED)
    shown = window_shown if wish.random is None or wish.windows else record_shown
    for number in numbers:
        print("\n".join(shown(view, number)).lstrip("\n"), end="\n\n")
    mark = "bold green" if coloured else " … ".join(BRACKETED)
    again = "" if wish.random is None else f"; --seed {wish.seed} shows the same again"
    print(f"{mark}: these tokens carry loss{again}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process ``python -m hpcft.data.inspect``; 0, or 2 with the reasons on stderr."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.data.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, type=Path, help="the run's plan.json")
    parser.add_argument("--store", required=True, type=Path, help="the folder of prepared data")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="the window to show; the first when absent")
    which.add_argument("--random", type=int, metavar="N", help="show N records taken at random")
    parser.add_argument("--seed", type=int, help="of --random; a new one each time when absent")
    parser.add_argument("--windows", action="store_true", help="with --random: whole windows instead of records")
    parser.add_argument("--split", default="train", help="train or validation")
    given = parser.parse_args(arguments)
    try:
        data = Plan.from_json(given.plan.read_text(encoding="utf-8"), str(given.plan)).data
        seed = random.randrange(2**31) if given.seed is None else given.seed
        show(data, given.store, Wish(given.split, given.index or 0, given.random, seed, given.windows))
    except Refusal as refusal:
        print(refusal.report, file=sys.stderr)
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
