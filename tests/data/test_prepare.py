"""Prepared data: the same bytes from the same request, published whole or not at all, refused when it is no use."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcft.data import store as stores
from hpcft.data.prepare import main, prepare
from hpcft.data.shards import Prepared, open_prepared
from hpcft.errors import Refusal
from hpcft.plan.plan import DataPlan, Source
from tests.data.conftest import Preparing, Tokenizers
from tests.data.small import TEMPLATES, chat, request, write_lines, write_tokenizer
from tests.plans import plan

ROWS = [chat(f"what is {n} ?", "the answer is " + "and two " * (n % 7) + str(n)) for n in range(40)]


def documents(shards: Prepared) -> list[tuple[int, ...]]:
    """The tokens of every document of the train split, in the order of the windows."""
    found = []
    for window in shards.train:
        start = 0
        for length in window.documents:
            found.append(tuple(window.tokens[start : start + length].tolist()))
            start += length
        assert start == len(window.tokens) == len(window.trained)
    return found


def content_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_packing_keeps_every_document_once_and_its_mask(prepared: Preparing) -> None:
    packed, unpacked = prepared(ROWS, max_length=90), prepared(ROWS, max_length=90, packing=False)
    assert Counter(documents(packed)) == Counter(documents(unpacked))
    assert len(unpacked.train) == 40 > len(packed.train)
    for shards in (packed, unpacked):
        facts = shards.manifest["splits"]["train"]
        windows = list(shards.train)
        assert facts["tokens"] == sum(len(w.tokens) for w in windows)
        assert facts["trained_tokens"] == sum(int(w.trained.sum()) for w in windows)
        assert facts["max_window"] == max(len(w.tokens) for w in windows) <= 90
        assert [shards.train.trained_tokens(i) for i in range(len(windows))] == [int(w.trained.sum()) for w in windows]
        assert facts["rows"] == 40
    assert (
        packed.manifest["splits"]["train"]["trained_tokens"] == unpacked.manifest["splits"]["train"]["trained_tokens"]
    )


def test_no_document_begins_with_a_trained_token(prepared: Preparing) -> None:
    for window in prepared(ROWS, max_length=90, train_on="all").train:
        starts = np.cumsum([0, *window.documents[:-1]])
        assert not window.trained[starts].any()


def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path, tokenizer: Tokenizers) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS * 10)
    made = []
    for workers in (1, 2):
        data = request(path, tokenizer=tokenizer(), workers=workers, validation_ratio=0.1, max_length=90)
        made.append(content_files(prepare(data, tmp_path / f"store{workers}").folder))
    assert made[0] == made[1]


def test_the_address_follows_content_and_options_not_names(tmp_path: Path, tokenizer: Tokenizers) -> None:
    first, second = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", ROWS)
    store = tmp_path / "store"
    data = request(first, tokenizer=tokenizer())
    content = prepare(data, store).content
    assert prepare(request(second, tokenizer=tokenizer()), store).content == content
    assert prepare(dataclasses.replace(data, workers=2), store).content == content
    changes: list[dict[str, Any]] = [
        {"max_length": 128}, {"packing": False}, {"train_on": "all"}, {"system": "x"}, {"seed": 8},
        {"train": (Source(path=str(first), rows=3),)}, {"truncation": "truncate_left"},
    ]  # fmt: skip
    others = [stores.address(dataclasses.replace(data, **c), prepare(data, store).inputs) for c in changes]
    assert len({content, *others}) == len(changes) + 1


def test_a_second_run_answers_from_the_index_without_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer())
    answer = prepare(data, tmp_path / "store")
    monkeypatch.setattr("hpcft.data.prepare.scan", None)
    monkeypatch.setattr("hpcft.data.tokenizer.load", None)
    assert prepare(data, tmp_path / "store") == answer


def test_changed_data_is_refused_until_it_is_prepared_and_touched_data_is_not(
    tmp_path: Path, tokenizer: Tokenizers
) -> None:
    path, store = write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "store"
    data = request(path, tokenizer=tokenizer())
    with pytest.raises(Refusal, match="not prepared"):
        open_prepared(store, data)
    content = prepare(data, store).content
    os.utime(path, (1, 1))
    assert open_prepared(store, data).content == content
    write_lines(path, ROWS[1:])
    with pytest.raises(Refusal, match="has changed since it was prepared") as refusal:
        open_prepared(store, data)
    assert "hpcft prepare" in refusal.value.problems[0].hint
    assert prepare(data, store).content != content
    write_lines(path, ROWS)
    assert open_prepared(store, data).content == content


@pytest.mark.parametrize("look", [False, True])
def test_touched_data_is_hashed_by_the_next_prepare_and_by_no_rank(
    look: bool, tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "store"
    data = request(path, tokenizer=tokenizer())
    content = prepare(data, store).content
    os.utime(path, (1, 1))
    if look:
        (tmp_path / "plan.json").write_text(plan(data=data).to_json())
        assert main(["--plan", str(tmp_path / "plan.json"), "--store", str(store), "--look"]) == 0
    else:
        assert prepare(data, store).content == content
    monkeypatch.setattr("hpcft.disk.sha256", None)
    assert open_prepared(store, data).content == content


def test_a_chat_template_added_to_the_tokenizer_makes_the_shards_stale(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    data = request(write_lines(tmp_path / "a.jsonl", [{"text": "two and two"}]), tokenizer=folder)
    prepare(data, tmp_path / "store")
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    with pytest.raises(Refusal, match="has changed"):
        open_prepared(tmp_path / "store", data)


def test_windows_sent_to_another_process_open_the_files_there(prepared: Preparing) -> None:
    from multiprocessing.reduction import ForkingPickler

    train = prepared(ROWS).train
    sent = bytes(ForkingPickler.dumps(train))
    assert len(sent) < 2000
    again = ForkingPickler.loads(sent)
    assert again[0].tokens.tolist() == train[0].tokens.tolist()


def test_prepared_data_outlives_its_source(tmp_path: Path, tokenizer: Tokenizers) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    data = request(path, tokenizer=tokenizer())
    prepare(data, tmp_path / "store")
    path.unlink()
    assert len(open_prepared(tmp_path / "store", data).train) > 0


def test_rows_are_sampled_and_repeated_as_asked(tmp_path: Path, tokenizer: Tokenizers) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    counts = {}
    for rows in (10, 90):
        data = request(Source(path=str(path), rows=rows), tokenizer=tokenizer(), max_length=90)
        prepare(data, tmp_path / "store")
        counts[rows] = Counter(documents(open_prepared(tmp_path / "store", data)))
    assert sorted(set(counts[10].values())) == [1]
    assert counts[10].total() == 10
    assert sorted(set(counts[90].values())) == [2, 3]
    assert counts[90].total() == 90
    stored = (open_prepared(tmp_path / "store", data).train.facts["files"]["train.tokens.bin"]) // 4
    assert stored == sum(len(document) for document in counts[90]), "a repeated document is stored once"


def test_two_files_of_two_shapes_are_concatenated_and_each_document_knows_its_line(
    tmp_path: Path, tokenizer: Tokenizers
) -> None:
    chats = write_lines(tmp_path / "a.jsonl", ROWS[:2])
    texts = write_lines(tmp_path / "b.jsonl", [{"text": "two and two"}])
    data = request(chats, texts, tokenizer=tokenizer(), packing=False)
    prepare(data, tmp_path / "store")
    shards = open_prepared(tmp_path / "store", data)
    assert [shards.train.origin(document) for document in range(3)] == [(0, 1), (0, 2), (1, 1)]
    assert [file["shape"] for file in shards.manifest["files"]] == ["messages", "text"]


def test_a_share_of_the_rows_is_set_aside_for_validation(prepared: Preparing) -> None:
    shards = prepared(ROWS, validation_ratio=0.2, packing=False)
    assert shards.validation is not None
    aside = {tuple(window.tokens.tolist()) for window in shards.validation}
    assert len(aside) == 8
    assert not aside & set(documents(shards))
    assert len(shards.train) == 32


def test_a_validation_file_is_its_own_split(tmp_path: Path, tokenizer: Tokenizers) -> None:
    train, held = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "v.jsonl", ROWS[:3])
    data = request(train, tokenizer=tokenizer(), validation=(Source(path=str(held)),), packing=False)
    answer = prepare(data, tmp_path / "store")
    validation = open_prepared(tmp_path / "store", data).validation
    assert validation is not None
    assert len(validation) == 3
    assert answer.manifest["audit"]["overlap"] == 3


LONG = chat("what ?", "two and " * 60)


def test_a_row_too_long_is_dropped_and_counted(prepared: Preparing) -> None:
    audit = prepared([*ROWS[:9], LONG], max_length=90).manifest["audit"]
    assert audit["rows"]["too_long"] == 1
    assert audit["rows"]["kept"] == 9
    assert audit["dropped"] == {"too long": 1}
    assert audit["examples"]["too long"][0][:2] == [0, 10]


def test_a_row_too_long_is_cut_on_the_side_asked_for(prepared: Preparing) -> None:
    (whole,), (right,), (left,) = (
        prepared([LONG], max_length=length, truncation=policy, packing=False).train
        for length, policy in ((256, "drop"), (90, "truncate_right"), (90, "truncate_left"))
    )
    assert right.tokens.tolist() == whole.tokens[:90].tolist()
    assert left.tokens.tolist() == whole.tokens[-90:].tolist()
    assert not left.trained[0]
    assert left.trained[1:].tolist() == whole.trained[-89:].tolist()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, "no assistant turn"),
        (chat("hello", "  "), "the assistant's words are empty"),
        ({"messages": [*chat("a")["messages"], {"role": "assistant", "content": "b", "loss": False}]}, "loss is false"),
        (chat("two and " * 60, "yes"), "truncate_right to 90 tokens cuts off"),
    ],
)
def test_rows_with_nothing_to_train_on_are_dropped_counted_and_refused_when_many(
    row: dict[str, Any], why: str, prepared: Preparing
) -> None:
    changes = {"max_length": 90, "truncation": "truncate_right"}
    audit = prepared([*ROWS[:9], row], max_untrained_rows=0.1, **changes).manifest["audit"]
    assert audit["rows"]["untrained"] == 1
    assert [reason for reason in audit["dropped"] if why in reason]
    with pytest.raises(Refusal, match=r"2 of 11 rows \(18%\) have no token to train on") as refusal:
        prepared([*ROWS[:9], row, row], max_untrained_rows=0.1, **changes)
    example = refusal.value.problems[1]
    assert example.where.endswith("rows.jsonl:10")
    assert why in example.what


def test_data_that_is_wholly_masked_is_refused_whatever_the_share_allowed(prepared: Preparing) -> None:
    with pytest.raises(Refusal, match="2 of 2 rows"):
        prepared([chat("hello", "")] * 2, max_untrained_rows=1.0)


def test_data_whose_every_row_is_too_long_is_refused_with_the_shortest(prepared: Preparing) -> None:
    with pytest.raises(Refusal, match=r"every row is longer than max_length") as refusal:
        prepared([LONG], max_length=90)
    assert "the shortest row has" in str(refusal.value)


def test_a_split_of_which_no_row_is_left_is_refused_by_name(tmp_path: Path, tokenizer: Tokenizers) -> None:
    good, long = write_lines(tmp_path / "a.jsonl", ROWS[:5]), write_lines(tmp_path / "v.jsonl", [LONG] * 5)
    for split, (train, held) in {"train": (long, good), "validation": (good, long)}.items():
        data = request(train, tokenizer=tokenizer(), validation=(Source(path=str(held)),), max_length=90)
        with pytest.raises(Refusal, match=f"no row is left for {split}: 5 of 5 rows are too long") as refusal:
            prepare(data, tmp_path / "store")
        assert "raise max_length" in refusal.value.problems[0].hint
        assert [problem.where for problem in refusal.value.problems[1:]] == [f"{long}:{line}" for line in (1, 2, 3)]


def test_a_validation_split_that_lost_the_few_rows_it_drew_is_refused(prepared: Preparing) -> None:
    with pytest.raises(Refusal, match="no row is left for validation: 1 of 1 rows are too long") as refusal:
        prepared([*ROWS[:4], LONG], seed=9, validation_ratio=0.1, max_length=90)
    assert "data_seed" in refusal.value.problems[0].hint


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:1] * 20])
def test_a_share_of_rows_too_few_to_be_parted_is_refused(rows: list[Any], prepared: Preparing) -> None:
    with pytest.raises(Refusal, match="too few rows to set one aside for validation") as refusal:
        prepared(rows, validation_ratio=0.1)
    assert "split_dataset_ratio: 0" in refusal.value.problems[0].hint


def test_no_rows_at_all_is_refused(tmp_path: Path, tokenizer: Tokenizers) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(Refusal, match="no rows are chosen"):
        prepare(request(Source(path=str(path), rows=0), tokenizer=tokenizer()), tmp_path / "store")


def test_rows_that_spell_a_special_token_are_counted(prepared: Preparing) -> None:
    audit = prepared([*ROWS[:3], chat("what is <|im_end|> ?", "a token")]).manifest["audit"]
    assert audit["rows"]["control_words"] == 1


def test_equal_rows_are_counted(prepared: Preparing) -> None:
    assert prepared([*ROWS[:3], *ROWS[:2]]).manifest["audit"]["duplicates"] == 2


def test_self_cognition_rows_are_filled_with_name_and_author(prepared: Preparing, tokenizer: Tokenizers) -> None:
    from hpcft.data.tokenizer import load

    shards = prepared([chat("who ?", "{{NAME}} by {{AUTHOR}}")], model_name="Ada", model_author="us")
    assert "Ada by us" in load(request(tokenizer=tokenizer()), tokenizer()).decode(shards.train[0].tokens)


@pytest.mark.parametrize("where", ["", "model"])
def test_a_tokenizer_that_is_not_there_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = tmp_path / (where or "nowhere")
    with pytest.raises(Refusal, match=r"no such folder for the tokenizer|holds no tokenizer"):
        prepare(request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=folder), tmp_path / "store")


SLOW = (
    "import sys, time; from hpcft.data import prepare, writer\n"
    "add = writer.SplitWriter.add\n"
    "def slowly(self, *a): time.sleep(0.05); add(self, *a)\n"
    "writer.SplitWriter.add = slowly\n"
    "sys.exit(prepare.main(sys.argv[1:]))"
)


def writing(data: DataPlan, folder: Path, store: Path) -> subprocess.Popen[str]:
    """A prepare in a process of its own that has begun to write documents, slowly."""
    (folder / "plan.json").write_text(plan(data=data).to_json())
    words = [sys.executable, "-c", SLOW, "--plan", str(folder / "plan.json"), "--store", str(store)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.getcwd()}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not list(store.glob(".*/train.tokens.bin")):
        assert time.monotonic() < deadline, "the writer never began"
        assert process.poll() is None, "the writer ended by itself"
        time.sleep(0.05)
    return process


def test_a_writer_killed_in_the_middle_leaves_nothing_a_reader_takes(tmp_path: Path, tokenizer: Tokenizers) -> None:
    """SIGKILL while documents are being written; the next writer takes the lock over and cleans up."""
    store, data = tmp_path / "store", request(write_lines(tmp_path / "a.jsonl", ROWS * 50), tokenizer=tokenizer())
    process = writing(data, tmp_path, store)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(store.glob(".*/train.tokens.bin"))
    with pytest.raises(Refusal, match="not prepared"):
        open_prepared(store, data)
    answer = prepare(data, store)
    assert sorted(path.name for path in store.iterdir()) == sorted([answer.content, "locks", "requests"])
    assert not list((store / "locks").iterdir())


def test_the_same_content_asked_for_by_another_name_waits_for_who_makes_it(
    tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = tmp_path / "store", write_lines(tmp_path / "a.jsonl", ROWS * 50)
    process = writing(request(path, tokenizer=tokenizer()), tmp_path, store)
    monkeypatch.setattr("hpcft.data.prepare.scan", None)  # nothing is left to be done
    answer = prepare(request(tmp_path / ".." / tmp_path.name / "a.jsonl", tokenizer=tokenizer()), store)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert len(list((store / "requests").iterdir())) == 2
    assert sorted(path.name for path in store.iterdir()) == sorted([answer.content, "locks", "requests"])


def test_a_failure_in_the_middle_leaves_no_temporary_folder(
    tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcft.data.writer.SplitWriter.finish", lambda *_: os.read(-1, 1))
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer())
    with pytest.raises(OSError, match="Bad file descriptor"):
        prepare(data, tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["locks", "work"]


def test_a_file_that_changes_while_it_is_prepared_is_not_published_under_a_wrong_address(
    tmp_path: Path, tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcft.data import prepare as module

    path = write_lines(tmp_path / "a.jsonl", ROWS)
    run = module._Preparation.run

    def and_meanwhile(self: Any, folder: Path) -> Any:
        manifest = run(self, folder)
        write_lines(path, ROWS[::-1])
        return manifest

    monkeypatch.setattr(module._Preparation, "run", and_meanwhile)
    with pytest.raises(Refusal, match="changed while it was being prepared"):
        prepare(request(path, tokenizer=tokenizer()), tmp_path / "store")
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, tokenizer: Tokenizers) -> None:
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer())
    answer = prepare(data, tmp_path / "store")
    with open(answer.folder / "train.tokens.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(Refusal, match=r"train\.tokens\.bin: a file of the prepared data is damaged"):
        open_prepared(tmp_path / "store", data)


def test_the_process_prints_json_on_stdout_and_refusals_on_stderr(
    tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "plan.json").write_text(plan(data=request(path, tokenizer=tokenizer())).to_json())
    words = ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["rows"] == 40
    assert main(words) == 0
    assert "closes 40 trained turns" in capsys.readouterr().out
    path.write_text("{broken\n")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a.jsonl:1: broken JSON" in captured.err


def test_a_full_disk_is_told_in_a_sentence_and_what_is_finished_is_kept(tmp_path: Path, tokenizer: Tokenizers) -> None:
    data = request(write_lines(tmp_path / "a.jsonl", ROWS * 50), tokenizer=tokenizer())
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    small = (
        "import resource, signal, sys; from hpcft.data.prepare import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", small, "--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the data is not prepared: [Errno 27] File too large" in done.stderr
    assert list((tmp_path / "store").glob("work/*/*.npz"))


def test_who_asks_by_a_name_without_a_revision_finds_what_was_prepared_with_one(
    tmp_path: Path, tokenizer: Tokenizers
) -> None:
    """A rendered script asks no hub for revisions, so its plan has none."""
    named = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer())
    pinned = dataclasses.replace(named, tokenizer_revision="0123abc")
    for name, data in (("named", named), ("pinned", pinned)):
        (tmp_path / f"{name}.json").write_text(dataclasses.replace(plan(), data=data).to_json())
    words = ["--plan", str(tmp_path / "pinned.json"), "--store", str(tmp_path / "store")]
    assert main(words) == 0
    with pytest.raises(Refusal, match="not prepared"):
        open_prepared(tmp_path / "store", named)
    assert main([*words, "--also", str(tmp_path / "named.json")]) == 0
    assert open_prepared(tmp_path / "store", named).content == open_prepared(tmp_path / "store", pinned).content


def test_the_real_records_keep_every_row_and_every_answer(
    real_data: Path, tmp_path: Path, tokenizer: Tokenizers
) -> None:
    sources = [Source(path=str(real_data / f"alpaca_{lang}_demo.json"), rows=100) for lang in ("en", "zh")]
    data = request(*sources, tokenizer=tokenizer(), max_length=8192)
    audit = prepare(data, tmp_path / "store").manifest["audit"]
    assert audit["rows"]["kept"] == 200
    assert audit["end_token"]["turns"] == 200
