"""What the objective's formula needs, decided: leaves that the task does not look at have their neutral value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpcft.catalog import OBJECTIVES
from hpcft.config.run import RunConfig
from hpcft.config.source import spoken
from hpcft.errors import Problem
from hpcft.plan.plan import ObjectivePlan

NEUTRAL: dict[str, Any] = {
    "beta": 0.0, "loss_type": "none", "label_smoothing": 0.0, "rpo_alpha": 0.0, "desirable_weight": 1.0,
    "undesirable_weight": 1.0, "simpo_gamma": 0.0, "cpo_alpha": 0.0, "center_rewards_coefficient": 0.0,
    "reference": "none", "labels": (),
}  # fmt: skip
# Where a person says nothing: leaf → task → value; "" for any other task.
DEFAULTS: dict[str, dict[str, Any]] = {
    "beta": {"simpo": 2.0, "": 0.1},
    "loss_type": {"": "sigmoid"},
    "rpo_alpha": {"": 0.0},
    "cpo_alpha": {"simpo": 0.0, "": 1.0},
}
LOSS_TYPES = {"dpo": ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm"), "cpo": ("sigmoid", "hinge")}
SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")  # of loss_type


def plan_objective(run: RunConfig) -> ObjectivePlan:
    """The settings of the run's task."""
    said = run.objective.model_dump()
    values = {
        leaf: _decided(leaf, said[leaf], run) if leaf in OBJECTIVES[run.task].keys else neutral
        for leaf, neutral in NEUTRAL.items()
    }
    return ObjectivePlan(**values)


def _decided(leaf: str, said: Any, run: RunConfig) -> Any:
    if leaf == "reference":
        return _reference(run) if said == "auto" else said
    if said is not None:
        return said
    return DEFAULTS[leaf].get(run.task, DEFAULTS[leaf][""])


def _reference(run: RunConfig) -> str:
    return "precompute" if _base_is_not_the_start(run) else "adapters_off"


def _base_is_not_the_start(run: RunConfig) -> str:
    """Why the model without its adapters is not the model that training began with; "" where it is."""
    tuner = run.tuner
    if tuner.tuner_type == "full":
        return "tuner_type: full has no adapters"
    if tuner.init_weights in ("pissa", "olora"):
        return f"init_weights: {tuner.init_weights} takes the adapters out of the weights beneath"
    return f"lora_bias: {tuner.lora_bias} trains biases of the model itself" if tuner.lora_bias != "none" else ""


def _smoothed(task: str) -> str:
    return f"or loss_type: {' or '.join(kind for kind in LOSS_TYPES[task] if kind in SMOOTHED)}"


def check_objective(run: RunConfig, where: Mapping[str, str]) -> list[Problem]:
    """What of section ``objective`` does not go with the task, or with itself."""
    if run.task not in OBJECTIVES:
        return []
    return [*_strangers(run, where), *_clashes(run, where)]


def _strangers(run: RunConfig, where: Mapping[str, str]) -> Iterator[Problem]:
    """Keys that were given and that the task does not look at."""
    for leaf in sorted(run.objective.model_fields_set):
        value = getattr(run.objective, leaf)
        if leaf not in OBJECTIVES[run.task].keys and value != type(run.objective).model_fields[leaf].default:
            users = tuple(row.name for row in OBJECTIVES.values() if leaf in row.keys)
            hint = f"leave it out, or task: {' or '.join(users)}"
            yield Problem(
                f"objective.{leaf}: task: {run.task} has no such thing", where.get(leaf, ""), spoken(value), (), hint
            )


def _clashes(run: RunConfig, where: Mapping[str, str]) -> Iterator[Problem]:
    ours, keys = run.objective, OBJECTIVES[run.task].keys
    kind = ours.loss_type or "sigmoid"
    if "loss_type" in keys and kind not in LOSS_TYPES[run.task]:
        what = f"objective.loss_type: task: {run.task} has no such loss"
        yield Problem(what, where.get("loss_type", ""), kind, LOSS_TYPES[run.task], "")
    if "loss_type" in keys and ours.label_smoothing and kind not in SMOOTHED:
        what = f"objective.label_smoothing: loss_type: {kind} is not smoothed"
        yield Problem(what, where.get("label_smoothing", ""), spoken(ours.label_smoothing), ("0",), _smoothed(run.task))
    if "desirable_weight" in keys and not (ours.desirable_weight or ours.undesirable_weight):
        what = "objective.desirable_weight, undesirable_weight: both are 0, so that no answer is learned from"
        yield Problem(what, where.get("desirable_weight", ""), "0", (), "raise one of them")
    if run.data.num_labels and OBJECTIVES[run.task].rows != "labelled":
        what = f"data.num_labels: task: {run.task} has no classes"
        yield Problem(
            what, where.get("num_labels", ""), spoken(run.data.num_labels), (), "leave it out, or task: seq_cls"
        )
    if run.data.truncation_strategy == "split" and run.task != "pretrain":
        what = f"data.truncation_strategy: task: {run.task} does not split: what comes later would lack its question"
        choices = ("drop", "truncate_left", *(() if _scores_ends(run) else ("truncate_right",)))
        yield Problem(what, where.get("truncation_strategy", ""), "split", choices, "or task: pretrain, of raw text")
    if OBJECTIVES[run.task].head == "score":
        yield from _clashes_of_scores(run, where)
    if ours.reference == "adapters_off" and "reference" in keys and (why := _base_is_not_the_start(run)):
        what = f"objective.reference: {why}, so that switching them off gives no reference"
        yield Problem(what, where.get("reference", ""), "adapters_off", ("auto", "precompute"), "")


def _clashes_of_scores(run: RunConfig, where: Mapping[str, str]) -> Iterator[Problem]:
    """A score stands in the place of the head, and is of a text's last token."""
    for leaf in ("target_modules", "modules_to_save"):
        if run.tuner.tuner_type == "lora" and "lm_head" in getattr(run.tuner, leaf):
            what = f"tuner.{leaf}: task: {run.task} has a score in the place of lm_head, which is trained in full"
            yield Problem(what, where.get(leaf, ""), "lm_head", (), "leave it out")
    if run.data.truncation_strategy == "truncate_right" and _scores_ends(run):
        what = f"data.truncation_strategy: task: {run.task} scores the end of a text, which this cuts off"
        yield Problem(what, where.get("truncation_strategy", ""), "truncate_right", ("drop", "truncate_left"), "")


def _scores_ends(run: RunConfig) -> bool:
    """Is the score that of how a text ends, so that it must not be cut off?"""
    return OBJECTIVES[run.task].head == "score" and OBJECTIVES[run.task].rows == "pair"
