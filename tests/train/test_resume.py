"""Stopped at any step and resumed, a run is bitwise the run that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from hpcft.run.ledger import read_events
from hpcft.run.paths import RunPaths
from hpcft.train import order
from hpcft.train.metrics import read_metrics
from hpcft.train.strategies import ddp
from tests.train import small

STEPS = 6
OPTIONS: dict[str, Any] = {
    "optim": {"max_steps": STEPS, "schedule": "cosine", "warmup_steps": 2},
    "checkpoint": {"save_steps": 0},
    "batch": {"global_windows": 4, "micro_windows": 1, "accumulation": 2},
}
PREPARED = small.Prepared(small.windows(10), small.windows(3, seed=1))


pytestmark = pytest.mark.usefixtures("small_buckets")


def signalled(at: int, number: int, rank: int) -> Any:
    """A watch that sends ``number`` to the process of ``rank`` during step ``at``."""

    def watch(step: int, signals: Any, run: Any) -> None:
        assert len(run.sharded.buckets) >= 3
        if step == at and run.world.rank == rank:
            os.kill(os.getpid(), number)

    return watch


def curve(root: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens", "trained_tokens")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(RunPaths(root).metrics)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dropout_model: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The undisturbed run: its folder, and what its two ranks came to."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp, "BUCKET_BYTES", 40_000)
        return root, small.on_ranks(2, small.train_here, small.tiny(dropout_model, 2, **OPTIONS), root, PREPARED)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, dropout_model: Path) -> Path:
    """The folder of a run that was stopped at step 3; to be copied."""
    root = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp, "BUCKET_BYTES", 40_000)
        plan = small.tiny(dropout_model, 2, **OPTIONS)
        small.on_ranks(2, small.train_here, plan, root, PREPARED, signalled(3, signal.SIGTERM, 0))
    return root


@pytest.mark.parametrize(
    ("number", "at", "rank"), [(signal.SIGTERM, 2, 1), (signal.SIGUSR2, 3, 0), (signal.SIGTERM, 5, 0)]
)
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(
    number: int, at: int, rank: int, tmp_path: Path, dropout_model: Path, whole: tuple[Path, list[dict[str, Any]]]
) -> None:
    plan = small.tiny(dropout_model, 2, **OPTIONS)
    stopped = small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, signalled(at, number, rank))
    assert [r["finished"] for r in stopped] == [False, False]
    assert stopped[0]["progress"]["step"] == at
    resumed = small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, attempt=2)
    assert curve(tmp_path / "cut") == curve(whole[0])
    assert len(curve(whole[0])) == STEPS + 2  # and two evaluations
    assert resumed[0]["weights"] == whole[1][0]["weights"]
    saved = [(e["step"], e["reason"]) for e in read_events(RunPaths(tmp_path / "cut")) if e["event"] == "saved"]
    assert saved == [(at, "stop"), (STEPS, "end")]


def test_save_now_saves_and_goes_on(tmp_path: Path, model: Path) -> None:
    plan = small.tiny(model, 2, **OPTIONS)
    [one, _] = small.on_ranks(2, small.train_here, plan, tmp_path, PREPARED, signalled(3, signal.SIGUSR1, 1))
    assert one["finished"]
    saved = [(e["step"], e["reason"]) for e in read_events(RunPaths(tmp_path)) if e["event"] == "saved"]
    assert saved == [(3, "asked"), (STEPS, "end")]


def test_a_file_asks_for_a_save_and_is_taken_away(tmp_path: Path, model: Path) -> None:
    (tmp_path / "save-now").touch()
    small.on_ranks(
        1, small.train_here, small.tiny(model, 1, **{**OPTIONS, "optim": {"max_steps": 2}}), tmp_path, PREPARED
    )
    assert not (tmp_path / "save-now").exists()


def test_a_run_cut_without_a_save_repeats_the_steps_since_the_last_one(
    tmp_path: Path, dropout_model: Path, whole: tuple[Path, list[dict[str, Any]]]
) -> None:
    options = {**OPTIONS, "checkpoint": {"save_steps": 2}}
    plan = small.tiny(dropout_model, 2, **options)

    def die(step: int, signals: Any, run: Any) -> None:
        if step == 4:
            os._exit(9)

    with pytest.raises(AssertionError, match="a rank died"):
        small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, die)
    small.on_ranks(2, small.train_here, plan, tmp_path / "cut", PREPARED, attempt=2)
    assert curve(tmp_path / "cut") == curve(whole[0])


def test_two_ranks_resume_what_one_rank_saved(tmp_path: Path, dropout_model: Path) -> None:
    """Another layout, the same windows and the same dropout; float32 sums differ in their last digits only."""
    same = {**OPTIONS, "batch": {"global_windows": 4, "micro_windows": 2, "accumulation": 1}}
    one = {**OPTIONS, "batch": {"global_windows": 4, "micro_windows": 2, "accumulation": 2}}
    small.on_ranks(1, small.train_here, small.tiny(dropout_model, 1, **one), tmp_path / "whole", PREPARED)
    watch = signalled(3, signal.SIGTERM, 0)
    small.on_ranks(1, small.train_here, small.tiny(dropout_model, 1, **one), tmp_path / "cut", PREPARED, watch)
    small.on_ranks(2, small.train_here, small.tiny(dropout_model, 2, **same), tmp_path / "cut", PREPARED, attempt=2)
    for (_, a), (_, b) in zip(small.losses(tmp_path / "cut"), small.losses(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("fault", ["wrong order", "dropped step", "forgotten moments", "other dropout"])
def test_the_bitwise_comparison_sees_what_it_should(
    fault: str,
    tmp_path: Path,
    dropout_model: Path,
    whole: tuple[Path, list[dict[str, Any]]],
    cut: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    spoil(fault, monkeypatch)
    small.on_ranks(2, small.train_here, small.tiny(dropout_model, 2, **OPTIONS), tmp_path, PREPARED, attempt=2)
    assert curve(tmp_path)[:3] == curve(whole[0])[:3]
    assert curve(tmp_path) != curve(whole[0])


def spoil(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, load, seed = order.Order.step, ddp.DataParallel.load, order.forward_seed
    if fault == "wrong order":
        monkeypatch.setattr(order.Order, "step", lambda self, consumed: step(self, consumed)[::-1])
    elif fault == "dropped step":
        monkeypatch.setattr(order.Order, "steps", lambda self, consumed: dropped(self, consumed))
    elif fault == "forgotten moments":
        monkeypatch.setattr(ddp.DataParallel, "load", lambda self, read, updates: load(self, read, 0))
    else:
        monkeypatch.setattr("hpcft.train.loop.forward_seed", lambda *at: seed(*at) + 1)


def dropped(self: order.Order, consumed: int) -> Any:
    while True:
        consumed += len(self.step(consumed))
        yield self.step(consumed)


def test_an_aborted_evaluation_is_done_after_the_resume(tmp_path: Path, model: Path) -> None:
    plan = small.tiny(model, 1, **{**OPTIONS, "train": {"eval_steps": 2}})
    whole = small.tiny(model, 1, **{**OPTIONS, "train": {"eval_steps": 2}})
    small.on_ranks(1, small.train_here, whole, tmp_path / "whole", PREPARED)

    def watch(step: int, signals: Any, run: Any) -> None:
        batches = run.evaluation._batches

        def signalled_meanwhile() -> Any:
            for batch in batches():
                signal.raise_signal(signal.SIGTERM)
                yield batch

        if step == 2:
            run.evaluation._batches = signalled_meanwhile

    small.on_ranks(1, small.train_here, plan, tmp_path / "cut", PREPARED, watch)
    assert not any("eval_loss" in line for line in read_metrics(RunPaths(tmp_path / "cut").metrics))
    small.on_ranks(1, small.train_here, plan, tmp_path / "cut", PREPARED, attempt=2)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_early_stopping_ends_the_run_and_the_best_checkpoint_is_kept(tmp_path: Path, model: Path) -> None:
    options: dict[str, Any] = {
        "optim": {"max_steps": 40, "learning_rate": 2e-2},
        "train": {"eval_steps": 1, "early_stopping_patience": 2},
        "checkpoint": {"save_steps": 1, "keep": 1, "load_best_at_end": True},
    }
    prepared = small.Prepared(small.windows(4), small.windows(3, seed=5))
    [result] = small.on_ranks(1, small.train_here, small.tiny(model, 1, **options), tmp_path, prepared)
    progress = result["progress"]
    assert result["finished"]
    assert progress["step"] < 40
    assert progress["step"] == progress["best_step"] + 2
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    best = f"step-{progress['best_step']:06d}"
    assert kept == {best, f"step-{progress['step']:06d}"}
    assert RunPaths(tmp_path).best.read_text().strip() == best


def test_a_stop_before_the_best_evaluation_does_not_lose_the_best_checkpoint(tmp_path: Path, model: Path) -> None:
    options: dict[str, Any] = {
        "optim": {"max_steps": 40, "learning_rate": 2e-2},
        "train": {"eval_steps": 1, "early_stopping_patience": 2},
        "checkpoint": {"save_steps": 0, "keep": 1, "load_best_at_end": True},
    }
    plan, prepared = small.tiny(model, 1, **options), small.Prepared(small.windows(4), small.windows(3, seed=5))
    whole, cut = RunPaths(tmp_path / "whole"), RunPaths(tmp_path / "cut")
    [undisturbed] = small.on_ranks(1, small.train_here, plan, whole.root, prepared)
    best = undisturbed["progress"]["best_step"]

    def told_to_stop(step: int, signals: Any, run: Any) -> None:
        if step == best:
            signal.raise_signal(signal.SIGTERM)

    small.on_ranks(1, small.train_here, plan, cut.root, prepared, told_to_stop)
    [resumed] = small.on_ranks(1, small.train_here, plan, cut.root, prepared, attempt=2)
    assert resumed["progress"]["best_step"] == best
    assert cut.best.read_text() == whole.best.read_text() == f"step-{best:06d}\n"
    assert cut.checkpoint(best).is_dir()


def test_a_run_that_begins_from_another_s_checkpoint_and_is_stopped_at_once_has_one_of_its_own(
    tmp_path: Path, dropout_model: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = small.assemble._resume

    def signalled_meanwhile(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return resume(*arguments)

    monkeypatch.setattr(small.assemble, "_resume", signalled_meanwhile)
    theirs = RunPaths(cut).checkpoint(3)
    plan = small.tiny(dropout_model, 2, **{**OPTIONS, "checkpoint": {"save_steps": 0, "resume": str(theirs)}})
    small.on_ranks(2, small.train_here, plan, tmp_path, PREPARED)
    assert RunPaths(tmp_path).checkpoint(3).is_dir()


def test_a_checkpoint_to_begin_with_that_is_not_there_is_refused_with_the_key(
    tmp_path: Path, dropout_model: Path
) -> None:
    plan = small.tiny(
        dropout_model, 1, **{**OPTIONS, "checkpoint": {"save_steps": 0, "resume": str(tmp_path / "none")}}
    )
    with pytest.raises(AssertionError, match=r"resume_from_checkpoint: no checkpoint is there(.|\n)*auto: the newest"):
        small.on_ranks(1, small.train_here, plan, tmp_path / "run", PREPARED)
