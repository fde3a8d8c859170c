"""Keys that were given and do nothing beside others, and values that leave little to be trained: a note for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpcft.config.leaves import leaf_sections
from hpcft.config.run import RunConfig, Tuner
from hpcft.config.source import Given, spoken


def idle(run: RunConfig, leaves: Mapping[str, Given]) -> list[str]:
    """leaves: what was said, by our names."""
    there = [(leaves[leaf].word, why) for leaf, why in _without_effect(run) if leaf in leaves and _asks(run, leaf)]
    return [f"{word} has no effect here: {why}" for word, why in there] + list(_too_much(run))


def _asks(run: RunConfig, leaf: str) -> bool:
    """Whether the value is more than "off": a 0 that has no effect takes nothing from anybody."""
    value = getattr(getattr(run, leaf_sections()[leaf]), leaf)
    if leaf == "eval_steps":
        return value not in (None, -1)
    return bool(value) and value != "none"


def _without_effect(run: RunConfig) -> Iterator[tuple[str, str]]:
    data, train = run.data, run.train
    if run.tuner.tuner_type == "full":
        yield from ((leaf, "tuner_type: full has no adapters") for leaf in Tuner.model_fields if leaf != "tuner_type")
    if data.val_dataset:
        yield "split_dataset_ratio", "val_dataset is what is evaluated on"
    elif not data.split_dataset_ratio:
        yield "eval_steps", "there is nothing to evaluate on; add val_dataset or split_dataset_ratio"
    if train.max_steps > 0:
        yield "num_train_epochs", f"max_steps: {train.max_steps} decides"
    if train.warmup_steps > 0:
        yield "warmup_ratio", f"warmup_steps: {train.warmup_steps} decides"
    if train.lr_scheduler_type != "wsd":
        yield "lr_decay_ratio", "only lr_scheduler_type: wsd has a decay of its own"


def _too_much(run: RunConfig) -> Iterator[str]:
    train, share = run.train, run.data.split_dataset_ratio
    if 0 < train.max_steps <= train.warmup_steps:
        yield (
            f"warmup_steps: {train.warmup_steps} is no less than max_steps: {train.max_steps}; "
            "the learning rate never comes to its peak"
        )
    if share > 0.5 and not run.data.val_dataset:
        yield f"split_dataset_ratio: {spoken(share)} sets more rows aside than are trained on"
