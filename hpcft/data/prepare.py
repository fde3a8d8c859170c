"""Prepare the data of a run: files → rows → documents → windows → one content folder of the store.

    python -m hpcft.data.prepare --plan runs/x/plan.json --store prepared

Two passes over the files: the first reads every record and refuses what is broken before a tokenizer is loaded,
the second tokenises the chosen rows in worker processes. Order, and so every byte, is that of the files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcft import disk
from hpcft.data import store as stores
from hpcft.data import tokenizer as tokenizers
from hpcft.data.audit import Audit
from hpcft.data.classes import Classes, counted, found
from hpcft.data.mixing import Choice, Rows, choose
from hpcft.data.pool import Desk, Workers
from hpcft.data.portions import Cut, changed, cut, pieces
from hpcft.data.progress import Progress, tell
from hpcft.data.refused import Refused
from hpcft.data.report import reported
from hpcft.data.scan import Scan, scan
from hpcft.data.shapes import WITHOUT_TEMPLATE
from hpcft.data.sources import DataFile, data_files
from hpcft.data.statistics import measured
from hpcft.data.store import Answer, Input
from hpcft.data.tokenise import TokeniseTask, of_split
from hpcft.data.work import Work
from hpcft.data.writer import SplitWriter
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan, Plan, data_key

EXIT_FAILED, EXIT_UNPREPARED = 1, 3


@dataclass(frozen=True)
class Read:
    """One data file of the request. number: its place among all; source: the number of its source."""

    number: int
    split: str
    source: int
    cut: Cut

    @property
    def input(self) -> Input:
        cut = self.cut
        kind = f"{self.split}:{self.source}"
        return Input(str(cut.file.path), cut.size, cut.mtime_ns, cut.sha256, kind, cut.file.pinned)


def prepare(data: DataPlan, store: Path) -> Answer:
    """The shards of ``data`` in ``store``, made now unless they are there.

    Raises Refusal for every fault of the data: broken or missing files, shapes that differ, rows that the template
    refuses, nothing to train on.
    """
    if answer := found_again(store, data):
        return answer
    stores.refuse_closed(store)
    with stores.one_writer(store, data_key(data), tell) as keep_request:
        if answer := found_again(store, data):
            return answer
        reads, others = _cut_all(data)
        inputs = [*(read.input for read in reads), *others]
        content = stores.address(data, inputs)
        with stores.one_writer(store, content, tell) as keep_content:
            if not (store / content / "manifest.json").is_file():
                _make_or_find(data, store, content, reads, inputs, lambda: (keep_request(), keep_content()))
        stores.remember(store, data, content, inputs)
    answer = stores.find(store, data)
    if answer is None:
        raise changed()
    return answer


def found_again(store: Path, data: DataPlan) -> Answer | None:
    """``store.find``; new dates of files are remembered, or every rank would hash them at every start."""
    answer = stores.find(store, data)
    if answer and answer.renewed:
        with contextlib.suppress(OSError):  # a store that only others may write to
            stores.remember(store, data, answer.content, answer.inputs)
    return answer


def _make_or_find(
    data: DataPlan, store: Path, content: str, reads: list[Read], inputs: list[Input], keep_locks: Callable[[], object]
) -> None:
    """``_make``; where another writer took a lock over that seemed dead, who is first takes the work area away."""
    try:
        _make(data, store, content, reads, inputs, keep_locks)
    except OSError:
        if not (store / content / "manifest.json").is_file():
            raise


def _make(
    data: DataPlan, store: Path, content: str, reads: list[Read], inputs: list[Input], keep_locks: Callable[[], object]
) -> None:
    work = Work(store, content)
    with stores.new_content(store, content) as folder, work.kept():
        manifest = _Preparation(data, reads, work, keep_locks).run(folder)
        if any(entry.changed for entry in inputs):  # its bytes would stand under the address of other bytes
            raise changed()
        stores.write_json(folder / "manifest.json", {"schema": stores.SCHEMA, "content": content, **manifest})
    work.end()


def _cut_all(data: DataPlan) -> tuple[list[Read], list[Input]]:
    """Every data file, hashed and cut into portions, and the files of tokenizer and template, hashed."""
    folder = tokenizers.folder_of(data)
    files = [(f, "tokenizer") for f in tokenizers.files_of(data, folder)]
    files += [(f, "template") for f in [tokenizers.template_file(data)] if f]
    found = [
        (split, number, file)
        for split in ("train", "validation")
        for number, source in enumerate(getattr(data, split))
        for file in data_files(source)
    ]
    cuts: dict[Path, Cut] = {}
    for _, _, file in found:
        if file.path not in cuts:
            cuts[file.path] = cut(file)
    reads = [Read(n, split, source, cuts[file.path]) for n, (split, source, file) in enumerate(found)]
    return reads, [_input(file, kind) for file, kind in files]


def _input(file: DataFile, kind: str) -> Input:
    if not file.path.exists():
        return Input(str(file.path), stores.ABSENT, 0, "", kind, file.pinned)
    now = file.path.stat()
    return Input(str(file.path), now.st_size, now.st_mtime_ns, disk.sha256(file.path), kind, file.pinned)


class _Preparation:
    """Both passes: from files that are cut into portions to a filled content folder."""

    def __init__(self, data: DataPlan, reads: Sequence[Read], work: Work, keep_locks: Callable[[], object]) -> None:
        self.data, self.reads, self.work, self.keep_locks = data, reads, work, keep_locks
        self.tokenizer_folder = tokenizers.folder_of(data)
        self.scans: dict[Path, Scan] = {}
        self.classes = Classes()
        self.audits = {split: Audit() for split in ("train", "validation")}
        self.taken = [0] * len(reads)

    def run(self, folder: Path) -> dict[str, Any]:
        """Write all splits into ``folder``; the manifest's facts."""
        with Workers(Desk(self.data, self.tokenizer_folder, self.work)) as workers:
            self._scan(workers)
            labels = [(read.cut.file.shown, self._scanned(read).labels) for read in self.reads]
            self.classes = found(labels, self.data.num_labels)
            choice = _choice(self.data, self.reads, [self.scans[read.cut.file.path] for read in self.reads])
            tokenizer = tokenizers.load(self.data, self.tokenizer_folder)
            template = tokenizers.Template(tokenizer, self.data)
            for read in self.reads:
                if self._scanned(read).shape not in WITHOUT_TEMPLATE and not template.exists:
                    raise tokenizers.no_template(self.data, read.cut.file.shown)
            splits = self._splits(self._copies(choice), workers, folder)
        fixed_date = tokenizers.FIXED_DATE if template.dated else None
        counts = ("duplicates", "held_duplicates", "overlap", "prompts")
        extra = {**{name: getattr(choice, name) for name in counts}, "fixed_date": fixed_date}
        files = [_file_facts(self._scanned(read), taken) for read, taken in zip(self.reads, self.taken, strict=True)]
        audit = {**self._audit().facts(tokenizer), **extra}
        facts = {"statistics": measured(folder, splits), "classes": counted(folder, splits, self.classes)}
        return {"splits": splits, "files": files, **facts, "audit": audit}

    def _scanned(self, read: Read) -> Scan:
        return self.scans[read.cut.file.path]

    def _scan(self, workers: Workers) -> None:
        """Read every file once."""
        for number, of_file in enumerate({read.cut.file.path: read.cut for read in self.reads}.values()):
            with Progress(f"reading {of_file.file.shown}") as tick:
                self.scans[of_file.file.path] = scan(number, of_file, self.data.rows, workers, self._kept(tick))

    def _kept(self, tick: Progress) -> Callable[[int, bool], None]:
        def done(rows: int, made: bool) -> None:
            tick(rows, made)
            self.keep_locks()

        return done

    def _copies(self, choice: Choice) -> list[dict[str, Any]]:
        """For each file: split → copies of each of its rows."""
        aside_of_train = not self.data.validation
        found: list[dict[str, Any]] = [{} for _ in self.reads]
        for split in ("train", "validation"):
            home = "train" if aside_of_train else split
            for source, copies in enumerate(getattr(choice, split)):
                start = 0
                for read in (read for read in self.reads if read.split == home and read.source == source):
                    rows = self._scanned(read).rows
                    found[read.number][split] = copies[start : start + rows]
                    start += rows
        return found

    def _splits(self, copies: list[dict[str, Any]], workers: Workers, folder: Path) -> dict[str, Any]:
        total = sum(int((of_split > 0).sum()) for of_file in copies for of_split in of_file.values())
        taken = {split for of_file in copies for split, of_split in of_file.items() if of_split.any()}
        with ExitStack() as stack:
            names = [name for name in ("train", "validation") if name in taken]
            writers: dict[str, SplitWriter] = {name: stack.enter_context(SplitWriter(folder, name)) for name in names}
            tick, refused = stack.enter_context(Progress("tokenising", total)), Refused()
            for task, (arrays, counts), made in workers.results(self._tasks(copies)):
                rows = 0
                for split in task.copies:
                    columns = of_split(arrays, split)
                    self.audits[split].add_counts(counts[split], columns["row_lengths"])
                    writers[split].add(columns, task.number)
                    rows += len(columns["row_lengths"])
                self.taken[task.number] += rows
                refused.add(task.piece.cut.file.shown, counts["refused"], rows)
                tick(rows, made)
                self.keep_locks()
        refused.check()
        if workers.found:
            tell(
                f"went on where an earlier prepare ended: {workers.found:,} of {workers.portions:,} portions were done"
            )
        self._check()
        return {name: writer.finish(self.data.max_length, self.data.packing) for name, writer in writers.items()}

    def _check(self) -> None:
        """Raises Refusal where what is left of all rows, or of those of a split, is no use."""
        names = [read.cut.file.shown for read in self.reads]
        self._audit().check(self.data, names)
        for split, audit in self.audits.items():
            if split == "train" or self.data.validation or self.data.validation_ratio > 0:
                audit.check_split(split, self.data, names)

    def _tasks(self, copies: list[dict[str, Any]]) -> Iterator[TokeniseTask]:
        """What is to be tokenised, portion by portion; portions of which no row is taken are left out."""
        for read in self.reads:
            found, start = self._scanned(read), 0
            if not any(of_split.any() for of_split in copies[read.number].values()):
                continue
            for piece in pieces(read.cut, self.data.rows, found.shape, found.first):
                end = start + found.counts[piece.portion.number]
                here = {split: of_file[start:end] for split, of_file in copies[read.number].items()}
                if here := {split: of_portion for split, of_portion in here.items() if of_portion.any()}:
                    yield TokeniseTask(read.number, piece, here, self.classes)
                start = end

    def _audit(self) -> Audit:
        """The audit of all rows, those of the train split first."""
        whole = Audit()
        for audit in self.audits.values():
            whole.add_counts(audit.counts(), np.array(audit.lengths, np.int64))
        return whole


def _choice(data: DataPlan, reads: Sequence[Read], scans: Sequence[Scan]) -> Choice:
    def rows(split: str) -> list[Rows]:
        mine = [
            [scan for read, scan in zip(reads, scans, strict=True) if (read.split, read.source) == (split, n)]
            for n in range(len(getattr(data, split)))
        ]
        return [
            Rows(np.concatenate([scan.digests for scan in some]), np.concatenate([scan.groups for scan in some]))
            for some in mine
        ]

    return choose(data.train, rows("train"), data.validation, rows("validation"), data.validation_ratio, data.seed)


def _file_facts(scan: Scan, taken: int) -> dict[str, Any]:
    return {"rows": scan.rows, "shape": scan.shape, "taken": taken, "unread": scan.unread}


def main(arguments: Sequence[str] | None = None) -> int:
    """The process ``python -m hpcft.data.prepare``; 0, or with the reasons on stderr 2, or 1 where a disk failed."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, type=Path, help="the run's plan.json")
    parser.add_argument("--also", type=Path, help="a plan that asks for the same data by names without a revision")
    parser.add_argument("--store", required=True, type=Path, help="the folder of prepared data")
    parser.add_argument("--workers", type=int, help="processes, in place of the plan's; the result is the same")
    parser.add_argument("--look", action="store_true", help="only look: exit code 3 where it is not prepared")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON instead of a table")
    given = parser.parse_args(arguments)
    try:
        data = Plan.from_json(given.plan.read_text(encoding="utf-8"), str(given.plan)).data
        if given.look:
            return 0 if found_again(given.store, data) else EXIT_UNPREPARED
        if given.workers:
            data = dataclasses.replace(data, workers=given.workers)
        with stores.readable(given.store):
            answer = prepare(data, given.store)
            if given.also:
                asked = Plan.from_json(given.also.read_text(encoding="utf-8"), str(given.also)).data
                stores.remember(given.store, asked, answer.content, answer.inputs)
    except (Refusal, PermissionError) as error:
        if isinstance(error, PermissionError) and not Path(error.filename or "").is_relative_to(given.store):
            raise
        refusal = error if isinstance(error, Refusal) else stores.closed(error.filename)
        print(refusal.report, file=sys.stderr)
        return refusal.exit_code
    except OSError as error:  # a full disk, a quota, a file system that is gone: no fault of the data
        hint = "what is finished is kept: mend that, for example make room, and type the same command again"
        print(refuse(f"the data is not prepared: {error}", where=str(given.store), hint=hint).report, file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(answer.manifest) if given.json else reported(data, answer))
    return 0


def _interrupted(number: int, _: object) -> None:
    """The way out that gives the lock back: a requeued job on another node would wait for it."""
    tell("interrupted; what is finished is kept for the next time")
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    sys.exit(main())
