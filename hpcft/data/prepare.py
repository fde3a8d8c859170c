"""Prepare the data of a run: files → rows → documents → windows → one content folder of the store.

    python -m hpcft.data.prepare --plan runs/x/plan.json --store prepared

Two passes over the files: the first reads every record and refuses what is broken before a tokenizer is loaded,
the second tokenises the chosen rows in worker processes. Order, and so every byte, is that of the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.data import store as stores
from hpcft.data import tokenizer as tokenizers
from hpcft.data.audit import Audit
from hpcft.data.classes import counted, found
from hpcft.data.documents import KEPT, Document
from hpcft.data.mixing import Choice, Rows, choose
from hpcft.data.pool import Encoders, Task
from hpcft.data.progress import shown, tell
from hpcft.data.report import reported
from hpcft.data.scan import Scan, rows_of, scan
from hpcft.data.shapes import WITHOUT_TEMPLATE
from hpcft.data.sources import DataFile, data_files
from hpcft.data.statistics import measured
from hpcft.data.store import Answer, Input
from hpcft.data.writer import SplitWriter
from hpcft.errors import Problem, Refusal, refuse
from hpcft.plan.plan import DataPlan, Plan


@dataclass(frozen=True)
class Read:
    """One data file of the request, read once. number: its place among all; source: the number of its source."""

    number: int
    split: str
    source: int
    file: DataFile
    scan: Scan


def prepare(data: DataPlan, store: Path) -> Answer:
    """The shards of ``data`` in ``store``, made now unless they are there.

    Raises Refusal for every fault of the data: broken or missing files, shapes that differ, rows that the template
    refuses, nothing to train on.
    """
    if answer := stores.find(store, data):
        return answer
    with stores.one_writer(store, data, tell) as keep_lock:
        if answer := stores.find(store, data):
            return answer
        reads, others = _read_all(data)
        inputs = [*(_data_input(read) for read in reads), *others]
        content = stores.address(data, inputs)
        if not (store / content / "manifest.json").is_file():
            with stores.new_content(store, content) as folder:
                manifest = _Preparation(data, reads, folder, keep_lock).run()
                if any(entry.changed for entry in inputs):  # its bytes would stand under the address of other bytes
                    raise _changed()
                stores.write_json(folder / "manifest.json", {"schema": stores.SCHEMA, "content": content, **manifest})
        stores.remember(store, data, content, inputs)
    answer = stores.find(store, data)
    if answer is None:
        raise _changed()
    return answer


def _changed() -> Refusal:
    return refuse("a file of the data changed while it was being prepared", hint="type the same command again")


def _read_all(data: DataPlan) -> tuple[list[Read], list[Input]]:
    """Every data file, scanned, and the files of tokenizer and template, hashed."""
    folder = tokenizers.folder_of(data)
    files = [(f, "tokenizer") for f in tokenizers.files_of(data, folder)]
    files += [(f, "template") for f in [tokenizers.template_file(data)] if f]
    found = [
        (split, number, file)
        for split in ("train", "validation")
        for number, source in enumerate(getattr(data, split))
        for file in data_files(source)
    ]
    scans: dict[Path, Scan] = {}
    for _, _, file in found:
        if file.path not in scans:
            scans[file.path] = scan(file, data.rows)
    reads = [Read(n, split, source, file, scans[file.path]) for n, (split, source, file) in enumerate(found)]
    return reads, [_input(file, kind) for file, kind in files]


def _data_input(read: Read) -> Input:
    kind, scan = f"{read.split}:{read.source}", read.scan
    return Input(str(read.file.path), scan.size, scan.mtime_ns, scan.sha256, kind, read.file.pinned)


def _input(file: DataFile, kind: str) -> Input:
    if not file.path.exists():
        return Input(str(file.path), stores.ABSENT, 0, "", kind, file.pinned)
    now = file.path.stat()
    return Input(str(file.path), now.st_size, now.st_mtime_ns, disk.sha256(file.path), kind, file.pinned)


class _Preparation:
    """The second pass: from scanned files to a filled content folder."""

    def __init__(self, data: DataPlan, reads: Sequence[Read], folder: Path, keep_lock: Any) -> None:
        self.data, self.reads, self.folder, self.keep_lock = data, reads, folder, keep_lock
        self.audit = Audit()
        self.classes = found([(read.file.shown, read.scan.labels) for read in reads], data.num_labels)
        self.taken = [0] * len(reads)

    def run(self) -> dict[str, Any]:
        """Write all splits; the manifest's facts."""
        choice = _choice(self.data, self.reads)
        folder = tokenizers.folder_of(self.data)
        tokenizer = tokenizers.load(self.data, folder)
        template = tokenizers.Template(tokenizer, self.data)
        for read in self.reads:
            if read.scan.shape not in WITHOUT_TEMPLATE and not template.exists:
                raise tokenizers.no_template(self.data, read.file.shown)
        splits = self._splits(list(self._tasks(choice)), tokenizer, folder)
        fixed_date = tokenizers.FIXED_DATE if template.dated else None
        counts = ("duplicates", "held_duplicates", "overlap", "prompts")
        extra = {**{name: getattr(choice, name) for name in counts}, "fixed_date": fixed_date}
        files = [_file_facts(read, taken) for read, taken in zip(self.reads, self.taken, strict=True)]
        audit = {**self.audit.facts(tokenizer), **extra}
        facts = {"statistics": measured(self.folder, splits), "classes": counted(self.folder, splits, self.classes)}
        return {"splits": splits, "files": files, **facts, "audit": audit}

    def _tasks(self, choice: Choice) -> Iterator[tuple[str, Read, Any]]:
        """(split, file, copies of each of its rows) in the order they are written."""
        aside_of_train = not self.data.validation
        for split in ("train", "validation"):
            copies = getattr(choice, split)
            home = "train" if aside_of_train else split
            for source in range(len(copies)):
                start = 0
                for read in (read for read in self.reads if read.split == home and read.source == source):
                    yield split, read, copies[source][start : start + read.scan.rows]
                    start += read.scan.rows

    def _splits(self, tasks: list[tuple[str, Read, Any]], tokenizer: Any, folder: Path) -> dict[str, Any]:
        total = sum(int((copies > 0).sum()) for _, _, copies in tasks)
        names = [name for name in ("train", "validation") if any(t[0] == name and t[2].any() for t in tasks)]
        with ExitStack() as stack:
            writers = {name: stack.enter_context(SplitWriter(self.folder, name)) for name in names}
            encoders = stack.enter_context(Encoders(self.data, folder, tokenizer))
            for task, document in shown(encoders.documents(_rows(tasks, self.data.rows)), "tokenising", total):
                self._take(writers, task, document)
        self.audit.check(self.data, [read.file.shown for read in self.reads])
        return {name: writer.finish(self.data.max_length, self.data.packing) for name, writer in writers.items()}

    def _take(self, writers: dict[str, SplitWriter], task: Task, document: Document | str) -> None:
        split, number, line, copies = task.key
        if isinstance(document, str):
            where = f"{self.reads[number].file.shown}:{line}"
            raise Refusal(Problem(document, where, hint=_template_hint(document)))
        self.taken[number] += 1
        self.audit.add(document, (number, line))
        if document.fate == KEPT:
            self.classes.mark(document)
            writers[split].add(document, copies, (number, line))
        if sum(self.taken) % 4096 == 0:
            self.keep_lock()


def _choice(data: DataPlan, reads: Sequence[Read]) -> Choice:
    import numpy as np

    def rows(split: str) -> list[Rows]:
        mine = [[r.scan for r in reads if (r.split, r.source) == (split, n)] for n in range(len(getattr(data, split)))]
        return [
            Rows(np.concatenate([scan.digests for scan in scans]), np.concatenate([scan.groups for scan in scans]))
            for scans in mine
        ]

    return choose(data.train, rows("train"), data.validation, rows("validation"), data.validation_ratio, data.seed)


def _rows(tasks: Sequence[tuple[str, Read, Any]], rows: str) -> Iterator[Task]:
    """The chosen rows, read again, with what is needed to place their documents."""
    for split, read, copies in tasks:
        if copies.any():
            for count, (line, row) in zip(copies.tolist(), rows_of(read.file, rows), strict=False):
                if count:
                    yield Task((split, read.number, line, count), row)


def _file_facts(read: Read, taken: int) -> dict[str, Any]:
    return {"rows": read.scan.rows, "shape": read.scan.shape, "taken": taken, "unread": read.scan.unread}


def _template_hint(sentence: str) -> str:
    if "system" in sentence.lower():
        return "this template knows no system turn: remove it from the data, or set chat_template"
    return "hpcft trains on what the template writes: mend the row, or set chat_template to a template that takes it"


def main(arguments: Sequence[str] | None = None) -> int:
    """The process ``python -m hpcft.data.prepare``; 0, or 2 with the reasons on stderr."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, type=Path, help="the run's plan.json")
    parser.add_argument("--also", type=Path, help="a plan that asks for the same data by names without a revision")
    parser.add_argument("--store", required=True, type=Path, help="the folder of prepared data")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON instead of a table")
    given = parser.parse_args(arguments)
    try:
        data = Plan.from_json(given.plan.read_text(encoding="utf-8"), str(given.plan)).data
        answer = prepare(data, given.store)
        if given.also:
            asked = Plan.from_json(given.also.read_text(encoding="utf-8"), str(given.also)).data
            stores.remember(given.store, asked, answer.content, answer.inputs)
    except Refusal as refusal:
        print(refusal.report, file=sys.stderr)
        return refusal.exit_code
    print(json.dumps(answer.manifest) if given.json else reported(data, answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
