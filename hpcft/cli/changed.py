"""A run that is there, submitted again with other keys: said before its data is prepared, in the words of its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpcft.cli.common import spelt

if TYPE_CHECKING:
    from hpcft.cli.common import Planned
    from hpcft.plan.plan import Plan, Source

# key of the Plan → ours, where its last word is another
LEAVES: dict[str, str] = {
    "model.path": "model", "model.dtype": "torch_dtype", "model.attention": "attn_impl",
    "model.quantization": "quant_bits", "tuner.kind": "tuner_type", "tuner.rank": "lora_rank",
    "tuner.alpha": "lora_alpha", "tuner.dropout": "lora_dropout", "tuner.bias": "lora_bias",
    "tuner.init_lora_weights": "init_weights", "data.train": "dataset", "data.validation": "val_dataset",
    "data.validation_ratio": "split_dataset_ratio", "data.tokenizer": "model", "data.tokenizer_source": "model",
    "data.tokenizer_revision": "revision", "data.truncation": "truncation_strategy", "data.workers": "dataset_num_proc",
    "data.rows": "task", "batch.global_windows": "global_batch_size",
    "batch.eval_windows": "per_device_eval_batch_size", "optim.schedule": "lr_scheduler_type",
    "optim.decay_ratio": "lr_decay_ratio", "optim.beta1": "adam_beta1", "optim.beta2": "adam_beta2",
    "optim.epsilon": "adam_epsilon", "train.objective": "task", "train.objective_module": "task",
    "train.dataloader_workers": "dataloader_num_workers", "train.collective_timeout": "ddp_timeout",
    "checkpoint.keep": "save_total_limit", "checkpoint.load_best_at_end": "load_best_model_at_end",
    "checkpoint.resume": "resume_from_checkpoint", "folders.runs": "output_dir", "folders.store": "cluster",
}  # fmt: skip


def refuse_changed(planned: Planned) -> None:
    """Raises Refusal, naming every key with its place and both values, where the run's folder holds another plan."""
    from hpcft.config.source import exists
    from hpcft.errors import Problem, Refusal
    from hpcft.plan.difference import differing
    from hpcft.run.expand import run_folder
    from hpcft.run.folder import MAY_CHANGE, read_plan
    from hpcft.run.ledger import is_finished
    from hpcft.run.paths import RunPaths

    paths = RunPaths(run_folder(planned.plan))
    if not exists(paths.plan):
        return
    old = read_plan(paths)
    new = _pinned(planned.plan, old)
    keys = [key for key in differing(new, old) if not {key, key.split(".")[0]} & MAY_CHANGE]
    problems = [Problem(what, where) for what, where in _told(keys, planned, new, old)]
    if problems:
        hint = "--name NAME makes it a run of its own"
        if not is_finished(paths):
            hint += f"; hpcft resume {spelt(paths.root)} goes on with the one that is there"
        raise Refusal([*problems[:-1], dataclasses.replace(problems[-1], hint=hint)])


def _told(keys: Sequence[str], planned: Planned, new: Plan, old: Plan) -> Iterator[tuple[str, str]]:
    """What differs and where it is said, once for each of our keys."""
    from hpcft.plan.difference import value

    origins, told = planned.loaded.origins, set()
    here, there = dataclasses.asdict(new), dataclasses.asdict(old)
    for key in keys:
        leaf = _leaf(key, origins)
        if leaf not in told:
            where = origins.get(leaf, "default")
            what = f"{leaf}: {_shown(value(there, key))} in run {old.name}, {_shown(value(here, key))} here"
            yield what, where if where != "default" else str(planned.loaded.file or "")
        told.add(leaf)


def _leaf(key: str, origins: Mapping[str, str]) -> str:
    if key == "data.seed":
        return "seed" if origins.get("data_seed") == "default" else "data_seed"
    leaf = LEAVES.get(key, key.rpartition(".")[2])
    return leaf if leaf in origins else key


def _shown(value: Any) -> str:
    from hpcft.config.source import spoken

    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value)) or "none"
    if isinstance(value, Mapping) and "path" in value:
        subset, rows = value.get("subset"), value.get("rows")
        return f"{value['path']}{f':{subset}' if subset else ''}{f'#{rows}' if rows else ''}"
    return "null" if value is None else spoken(value)


def _pinned(plan: Plan, old: Plan) -> Plan:
    """``plan`` with the revisions of ``old`` where it leaves them to the hub, which is not asked here."""
    data = dataclasses.replace(
        plan.data,
        tokenizer_revision=plan.data.tokenizer_revision or old.data.tokenizer_revision,
        train=_revised(plan.data.train, old.data.train),
        validation=_revised(plan.data.validation, old.data.validation),
    )
    model = dataclasses.replace(plan.model, revision=plan.model.revision or old.model.revision)
    return dataclasses.replace(plan, model=model, data=data)


def _revised(sources: tuple[Source, ...], old: tuple[Source, ...]) -> tuple[Source, ...]:
    if len(sources) != len(old):
        return sources
    return tuple(
        dataclasses.replace(new, revision=new.revision or before.revision)
        for new, before in zip(sources, old, strict=True)
    )
