"""The losses of pairs, answers and labelled texts: one process's on every strategy, for every accumulation, resumed."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, GraniteConfig

from hpcft.catalog import OBJECTIVES
from hpcft.data.kinds import Kind
from hpcft.errors import Refusal
from hpcft.plan.plan import Plan
from hpcft.run import manifest as manifests
from hpcft.run.manifest import Manifest
from hpcft.run.paths import RunPaths
from hpcft.train import world
from hpcft.train.facts import check_facts
from hpcft.train.metrics import read_metrics
from hpcft.train.model import prepare_model
from tests import plans
from tests.train import families, small
from tests.train.equivalence import TOLERANCE, Curve, difference, trained
from tests.train.test_copy_engines import replace_symmetric_memory

LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "DDP": ("ddp", {"dp": 2}),
    "FSDP2": ("fsdp", {"dp": 2}),
    "ZeRO-2": ("zero2", {"dp": 2}),
    "ZeRO-3": ("zero3", {"dp": 2}),
    "TP": ("ddp", {"dp": 1, "tp": 2}),
}
# a run's name → task, kind of tuning, settings beside those of ``settings_of``
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo lora": ("dpo", "lora", {"rpo_alpha": 0.5}),
    "dpo full": ("dpo", "full", {"reference": "precompute"}),
    "kto lora": ("kto", "lora", {}),
    "kto full": ("kto", "full", {"reference": "precompute"}),
    "orpo full": ("orpo", "full", {}),
    "simpo full": ("simpo", "full", {"cpo_alpha": 1.0}),
    "rm full": ("rm", "full", {"center_rewards_coefficient": 0.5}),
    "rm lora": ("rm", "lora", {}),
    "cls full": ("seq_cls", "full", {}),
    "cls lora": ("seq_cls", "lora", {}),
}


def pair_windows(count: int, seed: int = 0) -> small.Windows:
    """Windows of one to three pairs of uneven lengths."""
    draw = np.random.default_rng(seed)
    return small.Windows(_window(draw, [1, 2] * draw.integers(1, 4)) for _ in range(count))


def rated_windows(count: int, seed: int = 0) -> small.Windows:
    draw = np.random.default_rng(seed)
    return small.Windows(
        _window(draw, [int(kind) for kind in draw.integers(3, 5, size=draw.integers(1, 4))]) for _ in range(count)
    )


def labelled_windows(count: int, seed: int = 0) -> small.Windows:
    """Texts of three classes, whose first token tells the class."""
    draw = np.random.default_rng(seed)
    windows = small.Windows(_window(draw, [int(Kind.LABELLED)] * draw.integers(1, 4)) for _ in range(count))
    for window in windows:
        window.margins = [float(draw.integers(3)) for _ in window.documents]
        window.tokens[np.cumsum([0, *window.documents[:-1]])] = window.margins
    return windows


def _window(draw: np.random.Generator, kinds: list[int]) -> small.Window:
    lengths = [int(n) for n in draw.integers(4, 10, size=len(kinds))]
    trained = np.concatenate([np.arange(n) >= draw.integers(1, n) for n in lengths])
    tokens = draw.integers(0, small.VOCABULARY, size=sum(lengths)).astype(np.int32)
    return small.Window(tokens, trained, lengths, kinds, [0.25 * (i // 2 + 1) for i in range(len(kinds))])


PREPARED = {
    "pair": small.Prepared(pair_windows(22), pair_windows(5, seed=9)),
    "rated": small.Prepared(rated_windows(22), rated_windows(5, seed=9)),
    "labelled": small.Prepared(labelled_windows(22), labelled_windows(5, seed=9), classes=("a", "b", "c")),
}


def run(name: str, model: Path, strategy: str = "ddp", degrees: Any = None, **changes: Any) -> Plan:
    """Three steps of eight windows, the last one of six."""
    task, kind, settings = RUNS[name]
    row = OBJECTIVES[task]
    neutral = plans.plan().objective
    reference = "adapters_off" if "reference" in row.keys else "none"
    objective = {"beta": 0.5, "loss_type": "sigmoid", "reference": reference, **settings}
    sections: dict[str, Any] = {
        "train": {"objective": task, "objective_module": row.module, "eval_steps": 2},
        "tuner": {"kind": kind, "init_lora_weights": "false"},
        "data": {"rows": row.rows},
        "objective": dataclasses.replace(neutral, **objective),
        "optim": {"max_steps": 3, "learning_rate": 1e-3},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return families.plan_with(model, strategy, degrees or {"dp": 1}, **sections)


def metrics(root: Path) -> list[dict[str, Any]]:
    """Every number that an objective reports, step by step."""
    shown = ("rewards", "logps", "kl", "loss", "accuracy", "eval_rewards", "eval_kl", "eval_loss", "eval_accuracy")
    return [{k: v for k, v in line.items() if k.startswith(shown)} for line in read_metrics(RunPaths(root).metrics)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("model") / "llama", "llama")


class Alone:
    """What one process makes of each run, once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.curves = folder, model, dict[str, Curve]()

    def root(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def curve(self, name: str) -> Curve:
        if name not in self.curves:
            self.curves[name] = trained(run(name, self.model), self.root(name), prepared(name))
        return self.curves[name]


def prepared(name: str) -> small.Prepared:
    return PREPARED[OBJECTIVES[RUNS[name][0]].rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"), model)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.campaign if name == "ZeRO-3" else ()) for name in LAYOUTS]
)
@pytest.mark.parametrize("name", RUNS)
def test_a_strategy_gives_the_losses_norms_and_metrics_of_one_process(
    alone: Alone, tmp_path: Path, name: str, layout: str
) -> None:
    here = trained(run(name, alone.model, *LAYOUTS[layout]), tmp_path, prepared(name))
    assert difference(here, alone.curve(name)) < TOLERANCE
    for ours, theirs in zip(metrics(tmp_path), metrics(alone.root(name)), strict=True):
        if ours.get("loss") == pytest.approx(np.log(2), rel=1e-5):
            ours.pop("rewards/accuracies"), theirs.pop("rewards/accuracies")  # of equals, a matter of rounding
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["rm full", "rm lora", "cls lora"])
def test_a_score_is_sharded_and_whole_on_tensor_ranks_at_once(alone: Alone, tmp_path: Path, name: str) -> None:
    here = trained(run(name, alone.model, "fsdp", {"dp": 2, "tp": 2}), tmp_path, prepared(name))
    assert difference(here, alone.curve(name)) < TOLERANCE


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("name", RUNS)
def test_accumulation_changes_nothing(alone: Alone, tmp_path: Path, name: str, micro: int, accumulation: int) -> None:
    plan = run(name, alone.model, batch={"micro_windows": micro, "accumulation": accumulation})
    assert difference(trained(plan, tmp_path, prepared(name)), alone.curve(name)) < TOLERANCE


@pytest.mark.parametrize("layout", ["DDP", "FSDP2", "TP"])
@pytest.mark.parametrize("name", ["dpo lora", "dpo full", "kto full", "orpo full", "rm full", "rm lora", "cls full"])
def test_packing_changes_nothing(alone: Alone, tmp_path: Path, name: str, layout: str) -> None:
    plan = run(name, alone.model, *LAYOUTS[layout], data={"packing": False})
    assert difference(trained(plan, tmp_path, prepared(name)), alone.curve(name)) < TOLERANCE


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_recomputation_changes_nothing(alone: Alone, tmp_path: Path, layout: str, policy: str) -> None:
    plan = run("dpo lora", alone.model, *LAYOUTS[layout], train={"recomputation": policy})
    assert difference(trained(plan, tmp_path, prepared("dpo lora")), alone.curve("dpo lora")) < TOLERANCE


def test_the_reference_stands_still_while_the_policy_moves(alone: Alone) -> None:
    alone.curve("dpo full")
    lines = [line for line in metrics(alone.root("dpo full")) if "loss" in line]
    assert lines[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(lines[-1]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("name", ["rm full", "rm lora"])
def test_a_reward_model_learns_which_answers_are_chosen(alone: Alone, tmp_path: Path, name: str) -> None:
    plan = run(name, alone.model, optim={"max_steps": 15, "learning_rate": 3e-3}, train={"eval_steps": -1})
    trained(plan, tmp_path, prepared(name))
    first, *_, last = (line for line in metrics(tmp_path) if "loss" in line)
    assert (last["rewards/accuracies"], last["loss"] < 0.5 * first["loss"]) == (1.0, True)
    assert last["rewards/margins"] > 1.0


@pytest.mark.parametrize("name", ["cls full", "cls lora"])
def test_a_classifier_learns_the_classes(alone: Alone, tmp_path: Path, name: str) -> None:
    plan = run(name, alone.model, optim={"max_steps": 15, "learning_rate": 3e-3}, train={"eval_steps": 15})
    trained(plan, tmp_path, prepared(name))
    first, *_, last = (line for line in metrics(tmp_path) if "loss" in line)
    assert first["loss"] == pytest.approx(np.log(3), rel=0.15), "a new score knows nothing"
    assert (last["accuracy"] > 0.9, last["loss"] < 0.5 * first["loss"]) == (True, True)
    assert metrics(tmp_path)[-1]["eval_accuracy"] > 0.7


def test_a_classifier_keeps_a_base_s_classes_and_refuses_others(alone: Alone, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(alone.model, id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path)
    plan = run("cls full", tmp_path)
    assert torch.equal(score(plan.with_labels("abc")), model.score.weight)
    with pytest.raises(Refusal, match="the base has 3 classes already, the data 2"):
        score(plan.with_labels("ab"))
    with pytest.raises(Refusal, match="classes are others than the data's, a, c, b") as refusal:
        score(plan.with_labels("acb"))
    assert refusal.value.problems[0].choices == ("a", "b", "c")


def test_a_checkpoint_of_other_classes_is_not_gone_on_from(alone: Alone, tmp_path: Path) -> None:
    plan = run("cls full", alone.model, optim={"max_steps": 1})
    trained(plan, tmp_path, prepared("cls full"))
    check_facts(verified(RunPaths(tmp_path)), plan.with_labels("abc"), prepared("cls full").content)
    with pytest.raises(Refusal, match=r"objective\.labels: \['a', 'b', 'c'\] then, \['a', 'c', 'b'\] now"):
        check_facts(verified(RunPaths(tmp_path)), plan.with_labels("acb"), prepared("cls full").content)


@pytest.mark.parametrize("name", ["rm full", "rm lora"])
def test_a_base_without_a_score_gets_that_of_the_seed_and_one_with_a_score_keeps_it(
    alone: Alone, tmp_path: Path, name: str
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(alone.model, num_labels=1)
    model.save_pretrained(tmp_path)
    first, again, other = (score(run(name, alone.model, train={"seed": seed})) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(score(run(name, tmp_path)), model.score.weight)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_where_adapters_need_the_whole_base_the_score_is_of_the_seed_too(alone: Alone, changes: dict[str, Any]) -> None:
    plan = run("rm lora", alone.model, tuner={"kind": "lora", **changes})
    assert torch.equal(score(plan), score(plan))


def test_a_family_without_a_score_and_a_base_with_several_are_refused(alone: Alone, tmp_path: Path) -> None:
    GraniteConfig(vocab_size=small.VOCABULARY, hidden_size=8).save_pretrained(tmp_path / "granite")
    with pytest.raises(Refusal, match="no score for a model of type granite"):
        score(run("rm full", tmp_path / "granite"))
    model = AutoModelForSequenceClassification.from_pretrained(alone.model, num_labels=3)
    model.save_pretrained(tmp_path / "classes")
    with pytest.raises(Refusal, match="the base has 3 scores"):
        score(run("rm full", tmp_path / "classes"))


def score(plan: Plan) -> torch.Tensor:
    """The head that a run begins with."""
    skeleton = prepare_model(plan, world.join(plan, small.environment(0, 1, 0)))
    [name] = [name for name in skeleton.trained if "score" in name]
    skeleton.read(name, found := torch.empty(skeleton.shapes[name]))
    return found


def test_adapters_switched_off_are_the_model_that_a_pass_before_training_sees(alone: Alone, tmp_path: Path) -> None:
    """With adapters that start at nothing both references are the same."""
    curves = []
    for reference in ("adapters_off", "precompute"):
        plan = run("kto lora", alone.model, tuner={"kind": "lora", "init_lora_weights": "true"})
        plan = dataclasses.replace(plan, objective=dataclasses.replace(plan.objective, reference=reference))
        curves.append(trained(plan, tmp_path / reference, prepared("kto lora")))
    assert difference(*curves) < TOLERANCE


@pytest.mark.parametrize("name", ["dpo lora", "dpo full", "kto full", "rm full", "rm lora", "cls lora"])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(alone: Alone, tmp_path: Path, name: str) -> None:
    def watch(step: int, signals: Any, run: Any) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    plan, whole, cut = run(name, alone.model, train={"logging_steps": 2}), tmp_path / "whole", tmp_path / "cut"
    [expected] = small.on_ranks(1, small.train_here, plan, whole, prepared(name))
    [stopped] = small.on_ranks(1, small.train_here, plan, cut, prepared(name), watch)
    kept = [(file, file.stat().st_mtime_ns) for file in cut.glob("reference/*")]
    [result] = small.on_ranks(1, small.train_here, plan, cut, prepared(name), attempt=2)
    assert (stopped["progress"]["step"], stopped["finished"], len(kept)) == (
        1,
        False,
        4 * (plan.objective.reference == "precompute"),
    )
    assert result == expected
    assert metrics(cut) == metrics(whole)
    assert [(file, file.stat().st_mtime_ns) for file in cut.glob("reference/*")] == kept


def test_a_run_with_another_beta_does_not_go_on_from_its_checkpoint(alone: Alone, tmp_path: Path) -> None:
    plan = run("simpo full", alone.model, optim={"max_steps": 1})
    trained(plan, tmp_path, prepared("simpo full"))
    manifest = verified(RunPaths(tmp_path))
    other = dataclasses.replace(plan, objective=dataclasses.replace(plan.objective, beta=0.7))
    check_facts(manifest, plan, prepared("simpo full").content)
    with pytest.raises(Refusal, match=r"objective\.beta: 0\.5 then, 0\.7 now"):
        check_facts(manifest, other, prepared("simpo full").content)


def test_a_checkpoint_from_before_there_were_preference_objectives_is_gone_on_from(
    alone: Alone, tmp_path: Path
) -> None:
    plan = families.plan_with(alone.model, "ddp", {"dp": 1}, optim={"max_steps": 1})
    trained(plan, tmp_path, prepared("simpo full"))
    manifest = verified(RunPaths(tmp_path))
    old = {section: values for section, values in manifest.facts.items() if section != "objective"}
    check_facts(dataclasses.replace(manifest, facts=old), plan, prepared("simpo full").content)


def verified(paths: RunPaths) -> Manifest:
    [manifest] = manifests.verified(paths, deep=False)
    return manifest


def test_a_reference_of_other_data_is_computed_anew(alone: Alone, tmp_path: Path) -> None:
    plan = run("dpo full", alone.model, optim={"max_steps": 1})
    trained(plan, tmp_path, prepared("dpo full"))
    file = RunPaths(tmp_path).reference("train")
    numbers = np.load(file)
    facts = file.with_suffix(".json")
    facts.write_text(facts.read_text().replace(prepared("dpo full").content, "other"))
    np.save(file, numbers + 1)
    trained(plan, tmp_path, prepared("dpo full"), attempt=2)
    assert np.array_equal(np.load(file), numbers)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["dpo lora", "kto lora"])
def test_a_reference_made_beside_the_policy_is_the_same_where_layers_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(families.SIZES, "num_hidden_layers", 5)
    plan = run(name, families.save(tmp_path / "model", "qwen2"), *LAYOUTS["FSDP2"], train={"resharding": True})
    sent = trained(plan, tmp_path / "sent", prepared(name))
    replace_symmetric_memory(monkeypatch, tmp_path)
    assert difference(trained(plan, tmp_path / "copied", prepared(name)), sent) < 1e-6
