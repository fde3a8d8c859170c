"""A checkpoint is published whole or not at all, read whole or passed over, and never through pickle."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.errors import Refusal
from hpcft.run import manifest as manifests
from hpcft.run.ledger import Ledger, read_events
from hpcft.run.manifest import PARTS
from hpcft.run.paths import RunPaths
from hpcft.train import checkpoint, snapshot
from hpcft.train.checkpoint import Store
from hpcft.train.facts import check_facts
from hpcft.train.pick import choose
from hpcft.train.reader import Reader
from hpcft.train.snapshot import Host
from tests.train import small

OPTIONS: dict[str, Any] = {"optim": {"max_steps": 4}, "checkpoint": {"save_steps": 2, "keep": 4}}
PREPARED = small.Prepared(small.windows(8))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of a run of two ranks with checkpoints at steps 2 and 4; to be copied."""
    root = tmp_path_factory.mktemp("finished")
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), root, PREPARED)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resumed_at(root: Path, model: Path, **changes: Any) -> int:
    """Where another attempt of one rank begins."""
    options = {**OPTIONS, "batch": {"micro_windows": 4, "accumulation": 1}, **changes}

    def load(plan: Any) -> int:
        here = small.world.join(plan, os.environ)
        store = Store(RunPaths(root), plan, PREPARED.content, here, os.environ)
        store.tidy()
        manifest = store.choose()
        return manifest.step if manifest else 0

    [step] = small.on_ranks(1, load, small.tiny(model, 1, **options), attempt=2)
    return int(step)


def newest(root: Path) -> Path:
    return RunPaths(root).checkpoint(4)


def test_the_newest_whole_checkpoint_is_taken(root: Path, model: Path) -> None:
    assert resumed_at(root, model) == 4


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "hole", "missing", "torn manifest", "flipped manifest", "empty"]
)
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(damage: str, root: Path, model: Path) -> None:
    spoil(newest(root), damage)
    assert resumed_at(root, model) == 2


def spoil(folder: Path, damage: str) -> None:
    state, text = folder / "state-rank-0001.safetensors", folder / manifests.FILE
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "truncate":
        state.write_bytes(content[:-1])
    elif damage == "hole":
        content[-4096:] = bytes(4096)
        state.write_bytes(content)
    elif damage == "missing":
        state.unlink()
    elif damage == "torn manifest":
        text.write_text(text.read_text()[:-200])
    elif damage == "flipped manifest":
        text.write_text(text.read_text().replace('"consumed": 16', '"consumed": 12'))
    else:
        shutil.rmtree(folder)
        folder.mkdir()


def test_with_no_whole_checkpoint_left_the_run_refuses_instead_of_beginning_again(root: Path, model: Path) -> None:
    for step in (2, 4):
        spoil(RunPaths(root).checkpoint(step), "flip")
    with pytest.raises(AssertionError, match="no checkpoint of this run is whole"):
        resumed_at(root, model)


def test_a_run_whose_saved_checkpoints_are_gone_refuses_instead_of_beginning_again(root: Path, model: Path) -> None:
    shutil.rmtree(RunPaths(root).checkpoints)
    with pytest.raises(AssertionError, match=r"Refusal: .*step-000004: saved by an earlier attempt, and not there"):
        resumed_at(root, model)


def test_a_file_that_one_rank_cannot_read_back_gives_the_save_up_on_all(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum, failed = manifests.checksum, tmp_path / "failed"

    def unreadable(path: Path) -> str:
        if "rank-0001" in path.name and not failed.exists():
            failed.touch()
            raise manifests.Broken(path, "Input/output error")
        return checksum(path)

    monkeypatch.setattr(manifests, "checksum", unreadable)
    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED)
    assert [r["finished"] for r in results] == [True, True]
    [event] = [e for e in read_events(RunPaths(tmp_path)) if e["event"] == "save_failed"]
    assert "rank 1 Broken" in event["error"]
    assert "Input/output error" in event["error"]


def test_an_export_whose_checkpoint_the_run_removes_meanwhile_takes_the_one_that_is_there(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, paths = manifests.verify, RunPaths(root)

    def gone_by_then(folder: Path, deep: bool = True) -> manifests.Manifest:
        if newest(root).exists():  # the run saves, and keeps one
            shutil.copytree(newest(root), paths.checkpoint(6))
            newest(root).rename(paths.checkpoints / ".trash-step-000004.job-0-1")
        return verify(folder, deep)

    monkeypatch.setattr(manifests, "verify", gone_by_then)
    said: list[str] = []
    plan = small.tiny(model, 2, **OPTIONS)
    assert choose(paths, plan, "latest", False, said.append).folder == paths.checkpoint(6)
    with pytest.raises(Refusal, match="the run has no such checkpoint"):
        choose(paths, plan, "4", False, said.append)
    assert said == []


def test_a_checkpoint_that_no_pointer_can_name_is_published_all_the_same(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "point", full)
    [result] = small.on_ranks(1, small.train_here, small.tiny(model, 1, **OPTIONS), tmp_path, PREPARED)
    assert result["finished"]
    assert [e["step"] for e in read_events(RunPaths(tmp_path)) if e["event"] == "saved"] == [2, 4]


def test_leftovers_of_a_crash_are_removed_and_what_was_set_aside_comes_back(root: Path, model: Path) -> None:
    folder = RunPaths(root).checkpoints
    newest(root).rename(folder / ".old-step-000004.job-0-1")
    (folder / ".tmp-step-6.job-0-1").mkdir()
    assert resumed_at(root, model) == 4
    assert not [name for name in os.listdir(folder) if name.startswith((".tmp-", ".old-", ".trash-"))]


def test_a_stale_or_empty_pointer_changes_nothing(root: Path, model: Path) -> None:
    RunPaths(root).latest.write_text("step-000099\n")
    assert resumed_at(root, model) == 4
    RunPaths(root).latest.write_text("")
    assert resumed_at(root, model) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tuner": {"rank": 16}}, "tuner.rank"),
        ({"optim": {"max_steps": 4, "learning_rate": 1e-5}}, "optim.learning_rate"),
        ({"train": {"seed": 8}}, "train.seed"),
        ({"batch": {"global_windows": 8, "micro_windows": 8, "accumulation": 1}}, "batch.global_windows"),
    ],
)
def test_another_run_s_checkpoint_is_refused_by_name(
    changes: dict[str, Any], named: str, root: Path, model: Path
) -> None:
    with pytest.raises(AssertionError, match=named):
        resumed_at(root, model, **changes)


def test_other_data_is_refused(root: Path, model: Path) -> None:
    manifest = manifests.verify(newest(root))
    with pytest.raises(Refusal, match="prepared data"):
        check_facts(manifest, small.tiny(model, 2, **OPTIONS), "another content")


def test_a_reader_gives_any_range_whatever_the_layout(root: Path) -> None:
    reader = Reader(newest(root))
    for name, shape in reader.names().items():
        size = 1
        for n in shape:
            size *= n
        whole = reader.read(name, "master", 0, size)
        assert reader.read(name, "master", size // 3, size // 2).equal(whole[size // 3 : size // 3 + size // 2])
        with pytest.raises(IndexError):
            reader.read(name, "master", 1, size)


def test_a_save_that_fails_on_one_rank_is_given_up_on_all_and_the_run_goes_on(tmp_path: Path, model: Path) -> None:
    def watch(step: int, signals: Any, run: Any) -> None:
        write = run.saving.store.__class__._write_mine
        if step == 2 and run.world.rank == 1:

            def full(store: Any, sharded: Any, temporary: Path) -> Any:
                if not (tmp_path / "failed").exists():
                    (tmp_path / "failed").touch()
                    raise OSError(28, "No space left on device")
                return write(store, sharded, temporary)

            run.saving.store.__class__._write_mine = full

    results = small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED, watch)
    assert [r["finished"] for r in results] == [True, True]
    assert {path.name for path in RunPaths(tmp_path).checkpoints.iterdir()} == {"latest", "step-000004"}
    [failed] = [e for e in read_events(RunPaths(tmp_path)) if e["event"] == "save_failed"]
    assert "rank 1" in failed["error"]
    assert "No space left" in failed["error"]


def test_a_failed_save_that_the_ledger_cannot_be_told_of_is_survived_too(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, told = Ledger.write, tmp_path / "told"

    def full(*about: Any) -> None:
        raise OSError(28, "No space left on device")

    def not_told(ledger: Ledger, event: str, **facts: Any) -> Any:
        if event == "save_failed":
            told.touch()
            monkeypatch.undo()
            full()
        return write(ledger, event, **facts)

    monkeypatch.setattr(Store, "_write_mine", full)
    monkeypatch.setattr(Ledger, "write", not_told)
    [result] = small.on_ranks(1, small.train_here, small.tiny(model, 1, **OPTIONS), tmp_path, PREPARED)
    assert result["finished"]
    assert told.exists()


def test_a_save_that_keeps_failing_ends_the_run(tmp_path: Path, model: Path) -> None:
    def watch(step: int, signals: Any, run: Any) -> None:
        def full(store: Any, sharded: Any, temporary: Path) -> Any:
            raise OSError(28, "No space left on device")

        run.saving.store.__class__._write_mine = full

    with pytest.raises(AssertionError, match="SaveFailed"):
        small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED, watch)


def test_the_ranks_train_on_while_a_checkpoint_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, third = Store.publish, tmp_path / "third-step"

    def after_the_third_step(store: Store, snapshot: Any) -> Path:
        end = time.monotonic() + 120
        while snapshot.step == 2 and not third.exists():
            assert time.monotonic() < end, "no step was taken while the checkpoint was being written"
            time.sleep(0.01)
        return publish(store, snapshot)

    monkeypatch.setattr(Store, "publish", after_the_third_step)
    touch = lambda step, signals, run: third.touch() if step == 3 else None  # noqa: E731
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED, touch)
    undisturbed = tmp_path / "undisturbed"
    monkeypatch.undo()
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), undisturbed, PREPARED)
    ours, theirs = (
        [manifests.verify(RunPaths(root).checkpoint(2)).files[f"state-rank-000{rank}.safetensors"] for rank in (0, 1)]
        for root in (tmp_path, undisturbed)
    )
    assert ours == theirs, "what is written is the state of its step, not of the steps taken meanwhile"


def test_memory_for_the_copy_is_taken_before_the_first_save(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reserve, take = tmp_path / "seen", Host.reserve, Host.take

    def told(host: Host, wanted: Any) -> None:
        with seen.open("a") as file:
            file.write(f"reserved by {threading.current_thread().name.split('_')[0]}\n")
        reserve(host, wanted)

    def copied(host: Host, *of: Any) -> Any:
        with seen.open("a") as file:
            file.write("copied\n")
        return take(host, *of)

    monkeypatch.setattr(Host, "reserve", told)
    monkeypatch.setattr(Host, "take", copied)
    small.on_ranks(1, small.train_here, small.tiny(model, 1, **OPTIONS), tmp_path, PREPARED)
    first, *others = seen.read_text().splitlines()
    assert first == "reserved by saving", "by the thread that will write it, while the training goes on"
    assert set(others) == {"copied"}, "once"


def test_a_large_state_is_written_as_several_files_and_read_as_one(
    finished: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_NUMBERS", 5000)
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED)
    several, one = (manifests.verify(RunPaths(place).checkpoint(4)) for place in (tmp_path, finished))
    assert sorted(one.files) == ["state-rank-0000.safetensors", "state-rank-0001.safetensors"]
    assert len(several.files) > 6
    assert {"state-rank-0001.safetensors", "state-rank-0001-01.safetensors"} <= several.files.keys()
    with Reader(several.folder) as ours, Reader(one.folder) as theirs:
        for name, shape in ours.names().items():
            for part in PARTS:
                assert ours.read(name, part, 0, math.prod(shape)).equal(theirs.read(name, part, 0, math.prod(shape)))


def test_what_is_copied_from_a_gpu_goes_into_slabs_that_nothing_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, locked = torch.empty, []

    def plain(numbers: int, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        locked.extend([numbers] if pin_memory else [])
        return empty(numbers, **how)

    monkeypatch.setattr(torch, "empty", plain)
    monkeypatch.setattr(snapshot, "SLAB", 1024)
    host, sizes = Host(), {"a": 128, "b": 5, "c": 2000, "d": 256, "e": 1, "f": 0}
    host.reserve([*((key, size, True) for key, size in sizes.items()), ("g", 7, False)])
    assert locked == [256, 2048, 384]
    for number, key in enumerate("abcdefg"):
        host._buffers[key].fill_(number)
    for number, (key, size) in enumerate({**sizes, "g": 7}.items()):
        assert host._buffers[key].tolist() == [number] * size


def test_a_save_waits_for_the_one_before(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, order = Store.publish, tmp_path / "order"

    def slowly(store: Store, snapshot: Any) -> Path:
        with order.open("a") as file:
            file.write(f"{snapshot.step} begins\n")
        time.sleep(0.3)
        folder = publish(store, snapshot)
        with order.open("a") as file:
            file.write(f"{snapshot.step} ends\n")
        return folder

    monkeypatch.setattr(Store, "publish", slowly)
    options = {**OPTIONS, "checkpoint": {"save_steps": 1, "keep": 2}}
    small.on_ranks(1, small.train_here, small.tiny(model, 1, **options), tmp_path, PREPARED)
    lines = order.read_text().splitlines()
    assert lines == [f"{step} {what}" for step in (1, 2, 3, 4) for what in ("begins", "ends")]


def test_who_lost_the_lease_publishes_nothing(tmp_path: Path, model: Path) -> None:
    tmp_path.joinpath("lease.json").write_text(
        json.dumps({"job": "7", "restart": 1, "attempt": 2, "node": "n2", "plan": "", "time": 0.0})
    )
    with pytest.raises(AssertionError, match="FencedOff"):
        small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), tmp_path, PREPARED)
    assert not list(RunPaths(tmp_path).checkpoints.glob("step-*"))


def test_the_same_step_saved_again_replaces_the_old_one(root: Path, model: Path) -> None:
    spoil(newest(root), "flip")
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **OPTIONS), root, PREPARED, attempt=2)
    assert manifests.verify(newest(root)).step == 4


def test_retention_counts_by_number_and_keeps_the_newest(tmp_path: Path, model: Path) -> None:
    options: dict[str, Any] = {"optim": {"max_steps": 11}, "checkpoint": {"save_steps": 1, "keep": 2}}
    small.on_ranks(1, small.train_here, small.tiny(model, 1, **options), tmp_path, PREPARED)
    assert sorted(p.name for p in RunPaths(tmp_path).checkpoints.glob("step-*")) == ["step-000010", "step-000011"]


def test_only_trainable_weights_are_in_a_lora_checkpoint(tmp_path: Path, model: Path) -> None:
    plan = small.tiny(model, 1, tuner={"kind": "lora", "rank": 2}, **OPTIONS)
    small.on_ranks(1, small.train_here, plan, tmp_path, PREPARED)
    names = Reader(newest(tmp_path)).names()
    assert names
    assert all("lora_" in name for name in names)


def test_nothing_is_readable_by_others(root: Path) -> None:
    for path in [RunPaths(root).checkpoints, *newest(root).iterdir(), RunPaths(root).metrics]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_no_pickle_is_written_or_read_in_a_whole_life(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    options = {**OPTIONS, "optim": {"max_steps": 3}}
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **options), tmp_path, PREPARED)
    shutil.rmtree(RunPaths(tmp_path).checkpoint(3))
    small.on_ranks(2, small.train_here, small.tiny(model, 2, **options), tmp_path, PREPARED, attempt=2)
    assert RunPaths(tmp_path).checkpoint(3).is_dir()
