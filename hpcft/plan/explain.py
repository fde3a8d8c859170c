"""The Plan in words, each derived number with its arithmetic: what ``hpcft plan`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from hpcft.catalog import OBJECTIVES
from hpcft.clock import clock
from hpcft.errors import count, printable
from hpcft.plan.estimate import BYTES_PER_TOKEN, guessed_tokens, is_absent
from hpcft.plan.explain_memory import explain_memory, explain_time
from hpcft.plan.plan import QUANTISED, Plan, Source
from hpcft.plan.prepared import PreparedFacts
from hpcft.plan.steps import steps_per_epoch, total_steps, warmup_steps

LABEL = 12  # columns of the left margin
WIDEST = 32  # columns of a table's values
REFERENCES = {
    "none": "",
    "adapters_off": "\nreference: the same model with its adapters switched off, in every step",
    "precompute": "\nreference: a pass over the data before the first step, kept in the run folder",
}
MAIN_PARAMS = {
    "float32": "float32 masters and moments",
    "bfloat16": "bfloat16 weights and moments, no float32 masters\n"
    "WARNING: updates smaller than 1/256 of a weight are lost to rounding; rates that work with masters may not train",
}


def explain(
    plan: Plan, facts: PreparedFacts | None, chosen: Mapping[str, tuple[str, str]], cluster_file: str = ""
) -> str:
    """The page. facts: counts of the prepared data, None before it is prepared; chosen: leaf → (value, origin)."""
    sections = [
        [("run", f"{plan.name}   (plan {plan.fingerprint}, hpcft {plan.hpcft})"), *_model(plan)],
        [*_layout(plan), *_batch(plan), *_objective(plan), *_data(plan, facts), *_steps(plan, facts)],
        explain_memory(plan),
        [*_cluster(plan, cluster_file), *_paths(plan)],
        [("environment", _table((v.name, v.value, v.reason) for v in plan.environment))],
    ]
    if chosen:
        table = _table((leaf, printable(value), origin) for leaf, (value, origin) in chosen.items())
        sections.append([("settings", table)])
    said = ("\n".join(_line(label, text) for label, text in section) for section in sections if section)
    return "\n\n".join(said) + "\n"


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}" + text.replace("\n", "\n" + " " * LABEL)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Three columns; a value wider than WIDEST has its third column on the next line."""
    table = list(rows)
    first = max((len(row[0]) for row in table), default=0)
    second = min(WIDEST, max((len(row[1]) for row in table), default=0))
    gap = "\n" + " " * (first + second + 4)
    return "\n".join(f"{a:<{first}}  {b:<{second}}{'  ' if len(b) <= second else gap}{c}" for a, b, c in table)


def _model(plan: Plan) -> list[tuple[str, str]]:
    model, tuner = plan.model, plan.tuner
    revision = f" at {model.revision}" if model.revision else ""
    start = "random weights" if model.from_scratch else f"from {model.source}{revision}"
    start += "; there is none on this machine" if is_absent(model) else ""
    trained = "every weight is trained"
    if tuner.kind == "lora":
        trained = (
            f"LoRA of rank {tuner.rank} on {', '.join(tuner.target_modules)}, scaled by "
            + (f"{tuner.alpha:g} / √{tuner.rank}" if tuner.use_rslora else f"{tuner.alpha:g} / {tuner.rank}")
            + f", dropout {tuner.dropout:g}"
        )
    base = f"base in {QUANTISED[model.quantization]}, " if model.quantization != "none" else ""
    precision = f"{base}{model.dtype} compute, {MAIN_PARAMS[model.main_params_dtype]}"
    layers = f"recomputation {plan.train.recomputation}, {'' if plan.train.compiled else 'not '}compiled"
    return [("model", f"{model.path}, {start}"), ("tuner", trained), ("precision", precision), ("layers", layers)]


def _layout(plan: Plan) -> list[tuple[str, str]]:
    layout = plan.layout
    on_cpus = plan.resources.accelerator == "cpu"
    each = count(layout.ranks_per_node, "rank" if on_cpus else "GPU") + (" on CPUs" if on_cpus else "")
    axes = " × ".join(f"{axis.name} {axis.degree}" for axis in layout.axes if axis.degree > 1) or "one rank, no axis"
    world = count(layout.world_size, "rank")
    return [("layout", f"{count(layout.nodes, 'node')} × {each} = {world}; {plan.train.strategy}: {axes}")]


def _batch(plan: Plan) -> list[tuple[str, str]]:
    batch, length = plan.batch, plan.data.max_length
    return [
        (
            "batch",
            f"{count(batch.micro_windows, 'window')} × {batch.accumulation} accumulation × "
            f"{count(plan.layout.data_parallel, 'rank')} = {count(batch.global_windows, 'window')}\n"
            f"× {length:,} tokens ≤ {batch.global_windows * length:,} tokens an optimizer step",
        )
    ]


def _objective(plan: Plan) -> list[tuple[str, str]]:
    """The settings that its formula looks at; nothing for one that has none."""
    keys = [key for key in OBJECTIVES[plan.train.objective].keys if key != "reference"]
    if not keys:
        return []
    values = ((key, getattr(plan.objective, key)) for key in keys)
    settings = ", ".join(f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in values)
    return [("objective", f"{plan.train.objective}: {settings}{REFERENCES[plan.objective.reference]}")]


def _source(source: Source) -> str:
    rows = f", {source.rows} rows" if source.rows else ""
    weight = f", weight {source.weight:g}" if source.weight is not None else ""
    origin = (
        "" if source.source == "local" else f" ({source.source}{' at ' + source.revision if source.revision else ''})"
    )
    return f"{source.path}{origin}{rows}{weight}"


def _data(plan: Plan, facts: PreparedFacts | None) -> list[tuple[str, str]]:
    data = plan.data
    kind = "packed" if data.packing else "one record each"
    how = f"windows of ≤ {data.max_length:,} tokens, {kind}; longer records: {data.truncation}"
    lines = [*(_source(source) for source in data.train), how]
    if data.validation:
        lines.append("evaluated on " + "; ".join(_source(source) for source in data.validation))
    elif data.validation_ratio:
        lines.append(f"evaluated on {data.validation_ratio:.1%} of the rows, set aside")
    if facts:
        share = facts.trained_tokens / max(1, facts.tokens)
        lines.append(
            f"prepared: {count(facts.windows, 'window')}, {facts.tokens:,} tokens of which {share:.0%} are trained"
        )
    else:
        lines.append("not prepared yet; submit does it first, or: hpcft prepare")
        if absent := [source.path for source in (*data.train, *data.validation) if is_absent(source)]:
            lines.append(f"not on this machine: {', '.join(absent)}")
        if size := guessed_tokens(plan):
            lines.append(f"about {size:,} tokens, judging by the files' size ({BYTES_PER_TOKEN} bytes a token)")
    return [("data", "\n".join(lines))]


def _steps(plan: Plan, facts: PreparedFacts | None) -> list[tuple[str, str]]:
    optim = plan.optim
    lines = []
    steps = None
    if facts:
        steps = total_steps(optim, facts.windows, plan.batch.global_windows)
        epoch = steps_per_epoch(facts.windows, plan.batch.global_windows)
        division = f"⌈{count(facts.windows, 'window')} / {plan.batch.global_windows}⌉ = {count(epoch, 'step')} an epoch"
        lines.append(
            division
            if optim.max_steps > 0
            else f"{division} × {count(optim.num_train_epochs, 'epoch')} = {count(steps, 'optimizer step')}"
        )
    if optim.max_steps > 0:
        lines.append(f"max_steps: {count(optim.max_steps, 'optimizer step')}")
    elif not facts:
        lines.append(f"{count(optim.num_train_epochs, 'epoch')}; {_guessed_steps(plan)}")
    steps = optim.max_steps if optim.max_steps > 0 else steps
    warm = count(optim.warmup_steps, "step") if optim.warmup_steps else f"{optim.warmup_ratio:g} of the steps"
    if steps and not optim.warmup_steps:
        warm = f"⌈{optim.warmup_ratio:g} × {steps:,}⌉ = {count(warmup_steps(optim, steps), 'step')}"
    lines.append(f"learning rate {optim.learning_rate:g}, {optim.schedule}, warm-up {warm}")
    every = f"evaluated every {count(plan.train.eval_steps, 'step')}"
    lines.append({0: "evaluated at the end of each epoch", -1: "no evaluation"}.get(plan.train.eval_steps, every))
    return [("steps", "\n".join(lines)), *_time(plan, steps)]


def _guessed_steps(plan: Plan) -> str:
    """An estimate of the steps, said to be one."""
    exact = "the count of steps is known once the data is prepared"
    if not (plan.data.packing and (tokens := guessed_tokens(plan))):
        return exact
    windows = -(-tokens // plan.data.max_length)
    steps = total_steps(plan.optim, windows, plan.batch.global_windows)
    return f"about {count(steps, 'optimizer step')}, judging by the files' size; {exact}"


def _time(plan: Plan, steps: int | None) -> list[tuple[str, str]]:
    resources = plan.resources
    limit = f"limit {clock(resources.time_minutes)}"
    warned = f"; ranks are warned {resources.signal_lead} s before it, save and requeue"
    lines = [limit + (warned if resources.scheduler == "slurm" else "; then the run is ended")]
    if predicted := explain_time(plan):
        seconds, text = predicted
        lines.append(f"{text}; {_duration(steps * seconds)} for {count(steps, 'step')}" if steps else text)
    return [("time", "\n".join(lines))]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.2g} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _cluster(plan: Plan, file: str) -> list[tuple[str, str]]:
    r = plan.resources
    named = f"{r.cluster} ({file})" if file else r.cluster
    if r.scheduler == "none":
        return [("cluster", f"{named}: this machine, without Slurm, {count(r.cpus_per_task, 'core')} a rank")]
    asked = [f"partition {r.partition}" if r.partition else "", f"account {r.account}" if r.account else ""]
    asked += [
        f"{count(r.gpus_per_node, 'GPU')} a node ({r.gpu_request})" if r.gpus_per_node else "",
        f"{count(r.cpus_per_task, 'core')} a rank",
    ]
    asked += [f"memory {r.memory} a node" if r.memory and r.memory != "0" else "", "whole nodes" if r.exclusive else ""]
    preempted = {
        "requeue": "when preempted: saved, requeued, resumed",
        "cancel": "when preempted: this partition cancels; the run requeues itself if the site lets it",
        "none": "this partition does not preempt",
    }[r.preemption]
    lines = [f"{named}: " + ", ".join(part for part in asked if part), preempted]
    if job := r.prepare_job:
        lines.append(f"data that is not prepared: a job of {count(job.cores, 'core')}, for which the run waits")
    return [("cluster", "\n".join(lines))]


def _paths(plan: Plan) -> list[tuple[str, str]]:
    run = PurePosixPath(plan.folders.runs) / plan.name
    save = (
        f"every {count(plan.checkpoint.save_steps, 'step')}"
        if plan.checkpoint.save_steps
        else "at the end and when stopped"
    )
    return [
        ("paths", f"run {run}, prepared data {plan.folders.store}"),
        ("checkpoints", f"{save}; the newest {plan.checkpoint.keep} that verify are kept, and the best"),
    ]
