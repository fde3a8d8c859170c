"""What of a run and a cluster does not fit together, all of it at once, before anything is made of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping

from hpcft.catalog import AUTO, LATER_OBJECTIVES, OBJECTIVES, STRATEGIES
from hpcft.clock import clock
from hpcft.config.cluster import ClusterProfile
from hpcft.config.run import RunConfig
from hpcft.errors import Problem, near

ENDS = ("embed_tokens", "lm_head")
CUT = ("self_attn", "mlp", "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj",
       "gate_up_proj")  # fmt: skip
LARGEST_DEGREE = 4096  # nobody asks for more, and the search for a divisor ends


def check_words(run: RunConfig, where: Mapping[str, str]) -> list[Problem]:
    """Strategy and objective against the catalog, and the strategy against what else is said."""
    problems = []
    later: Mapping[str, str]
    for leaf, word, known, later in (
        ("strategy", run.parallel.strategy, STRATEGIES, {}),
        ("task", run.task, OBJECTIVES, LATER_OBJECTIVES),
    ):
        if word in known or (leaf == "strategy" and word == AUTO):
            continue
        guess = near(word, known) or near(word, later)
        hint = f"use {later[word]}" if word in later else f"did you mean {guess}?" if guess else ""
        what = "not in this release" if word in later else "no such value"
        choices = (*known, AUTO) if leaf == "strategy" else tuple(known)
        problems.append(Problem(f"{leaf}: {what}", where.get(leaf, ""), word, choices, hint))
    if run.model.quant_bits and run.model.base_precision:
        what = "model.base_precision: the base is in 4 bits already, by quant_bits"
        problems.append(Problem(what, where.get("base_precision", ""), "fp8", ("null",), "leave out one of the two"))
    if (run.model.quant_bits or run.model.base_precision) and run.tuner.init_weights == "pissa":
        what = "tuner.init_weights: pissa decomposes the base, which is not to be had from a quantised one"
        problems.append(Problem(what, where.get("init_weights", ""), "pissa", ("true", "gaussian", "orthogonal")))
    found = clashes(
        run.parallel.strategy, run.parallel.tp, run.parallel.dp_replicate, tuner=run.tuner.tuner_type,
        target_modules=run.tuner.target_modules, modules_to_save=run.tuner.modules_to_save, dora=run.tuner.use_dora,
        dtype=run.model.torch_dtype,
        quantization="nf4" if run.model.quant_bits else run.model.base_precision or "none",
        main_params=run.model.main_params_dtype, compiled=run.train.torch_compile is True,
    )  # fmt: skip
    return problems + [dataclasses.replace(problem, where=where.get(leaf, "")) for leaf, problem in found]


def check_home(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str]) -> list[Problem]:
    """``~`` where it would reach the ranks: to them it is a folder's name, and an exported adapter keeps it."""
    problems = []
    if run.model.model.startswith("~"):
        hint = "write the folder out; on a command line your shell does: --model ~/models/x"
        what = "model: nobody reads ~ on the way to the job"
        problems.append(Problem(what, where.get("model", ""), run.model.model, hint=hint))
    folders = {"output_dir": run.checkpoint.output_dir, "runs": cluster.runs, "store": cluster.store,
               "hf_home": cluster.hf_home, "node_cache": cluster.node_cache}  # fmt: skip
    for leaf, folder in folders.items():
        if re.match("~[^/]", folder or ""):
            what = f"{leaf}: another user's home is not known to the job"
            problems.append(Problem(what, where.get(leaf, ""), folder or "", hint="write the folder out"))
    return problems


def home(folder: str) -> str:
    """``~/x`` as the variable that the job's shell reads: a Plan does not depend on whose home it is made in."""
    return re.sub("^~(?=/|$)", "$HOME", folder)


def clashes(
    strategy: str, tp: int, dp_replicate: int, *, tuner: str, target_modules: Collection[str],
    modules_to_save: Collection[str], dora: bool, dtype: str, quantization: str, main_params: str, compiled: bool,
) -> Iterator[tuple[str, Problem]]:  # fmt: skip
    """What a strategy cannot do together with what else is asked: the leaf that asks it, and the problem."""
    axes = STRATEGIES[strategy].axes if strategy in STRATEGIES else ("tp", "dp_replicate")
    for leaf, degree in (("tp", tp), ("dp_replicate", dp_replicate)):
        if degree > 1 and leaf not in axes:
            able = " or ".join(row.name for row in STRATEGIES.values() if leaf in row.axes)
            what = f"parallel.{leaf}: {strategy} knows no such axis"
            yield leaf, Problem(what, "", str(degree), ("1",), f"strategy: {able}")
    if strategy.startswith("zero") and dtype == "float16":
        what = f"model.torch_dtype: float16 needs its losses scaled, which {strategy} does not do here"
        yield "torch_dtype", Problem(what, "", dtype, ("bfloat16", "float32"), "or strategy: fsdp")
    if compiled:
        yield from uncompilable(strategy)
    if quantization != "none":
        yield from _quantised(strategy, tp, tuner, quantization, dtype, dora)
    if main_params != "float32":
        yield from _without_masters(strategy, tuner, main_params, dtype)
    if tp > 1 and tuner == "lora":
        yield from _split("target_modules", target_modules, ENDS)
        yield from _split("modules_to_save", modules_to_save, (*ENDS, *CUT))
        if dora:
            what = "tuner.use_dora: a weight's length is taken over all of it, of which each tensor rank has a part"
            yield "use_dora", Problem(what, "", "true", ("false",), "tp: 1, with strategy: fsdp to shard it")


def _quantised(
    strategy: str, tp: int, tuner: str, quantization: str, dtype: str, dora: bool
) -> Iterator[tuple[str, Problem]]:
    """What a quantised base cannot do: it is frozen, and held whole or sharded by FSDP2."""
    leaf, value = ("quant_bits", "4") if quantization == "nf4" else ("base_precision", quantization)
    for wrong, what, hint in (
        (
            quantization == "fp8" and dtype == "float16",
            "in 8-bit floats is multiplied in bfloat16, not in float16",
            "torch_dtype: bfloat16",
        ),
        (
            quantization == "fp8" and dora,
            "in 8-bit floats keeps no weights that use_dora could measure",
            "use_dora: false, or quant_bits: 4 in place of base_precision",
        ),
        (tuner == "full", "is frozen, but tuner_type: full trains it", "tuner_type: lora"),
        (strategy.startswith("zero"), f"is not sharded by {strategy}", "strategy: ddp or fsdp"),
        (tp > 1, f"is not split among tensor ranks, but tp is {tp}", "tp: 1, with strategy: fsdp to shard it"),
    ):
        if wrong:
            yield leaf, Problem(f"model.{leaf}: a quantised base {what}", "", value, ("null",), hint)


def _without_masters(strategy: str, tuner: str, main_params: str, dtype: str) -> Iterator[tuple[str, Problem]]:
    """What cannot go without float32 masters: adapters, DeepSpeed, and what is computed in another type."""
    able = [row.name for row in STRATEGIES.values() if main_params in row.main_params]
    for wrong, what, hint in (
        (tuner != "full", f"is for a model that is trained whole, but tuner_type: {tuner} trains adapters, which are "
         "small, and float32", "tuner_type: full"),
        (strategy in STRATEGIES and strategy not in able, f"is not for {strategy}, which keeps float32 masters",
         f"strategy: {' or '.join(able)}"),
        (dtype not in (AUTO, main_params), f"is what is computed with, but torch_dtype is {dtype}",
         f"torch_dtype: {main_params}"),
    ):  # fmt: skip
        if wrong:
            what = f"model.main_params_dtype: {main_params} {what}"
            yield "main_params_dtype", Problem(what, "", main_params, ("float32",), hint)


def uncompilable(strategy: str) -> Iterator[tuple[str, Problem]]:
    """What a compiled layer cannot have inside: weights that come and go."""
    if strategy.startswith("zero3"):
        what = f"train.torch_compile: {strategy} gathers weights inside of layers, which are not compiled then"
        yield "torch_compile", Problem(what, "", "true", ("false",), "strategy: fsdp")


def _split(leaf: str, names: Collection[str], cut: Collection[str]) -> Iterator[tuple[str, Problem]]:
    """What tensor ranks hold in parts is not trained beside adapters."""
    split = [name for name in names if name.rpartition(".")[2] in cut]
    if split:
        what = f"tuner.{leaf}: tensor parallelism splits {' and '.join(split)}, which LoRA then cannot train"
        yield leaf, Problem(what, "", " ".join(split), (), "tp: 1, or leave out what is split")


def check_mesh(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str]) -> list[Problem]:
    """The degrees of the axes against the ranks, with the nearest degrees that divide."""
    per_node = run.slurm.nproc_per_node or cluster.gpus_per_node or 1
    ranks, tp, copies = (run.slurm.nodes or 1) * per_node, run.parallel.tp, run.parallel.dp_replicate
    if per_node % tp:
        what = f"parallel.tp: {tp} does not divide the {per_node} ranks of a node, so a tensor group would span nodes"
        hint = "more ranks share a model that is too large with strategy: fsdp"
        return [Problem(what, where.get("tp", ""), str(tp), _dividing(per_node, tp), hint)]
    if (ranks // tp) % copies:
        rest = f"{ranks} ranks / tp {tp} = {ranks // tp} ranks" if tp > 1 else f"{ranks} ranks"
        what = f"parallel.dp_replicate: {copies} copies do not divide the {rest}"
        hint = "each copy is sharded over its share of the ranks: as many copies as nodes is usual, 1 is no copy at all"
        return [Problem(what, where.get("dp_replicate", ""), str(copies), _dividing(ranks // tp, copies), hint)]
    return []


def check_shape(
    run: RunConfig, where: Mapping[str, str], *, heads: int | None, kv_heads: int | None, intermediate: int | None,
    experts: int = 0,
) -> list[Problem]:  # fmt: skip
    """The tensor degree against the shape of the model; None where a number is not known."""
    tp, where_tp = run.parallel.tp, where.get("tp", "")
    if experts and tp > 1:
        what = f"parallel.tp: the model has {experts} experts in a layer, which tensor ranks do not cut"
        return [Problem(what, where_tp, str(tp), ("1",), "strategy: fsdp, which shards them")]
    known = {"heads": heads, "key-value heads": kv_heads, "feed-forward columns": intermediate}
    sizes = {name: size for name, size in known.items() if size}
    choices = _dividing(math.gcd(*sizes.values()), tp) if sizes else ()
    return [
        Problem(f"parallel.tp: {tp} does not divide the model's number of {name}, {size:,}", where_tp, str(tp), choices,
                "more ranks share the rest of the work with strategy: fsdp")
        for name, size in sizes.items() if size % tp
    ]  # fmt: skip


def _dividing(number: int, wanted: int) -> tuple[str, ...]:
    """The degrees below and above ``wanted`` that divide ``number``, none above LARGEST_DEGREE."""
    start = min(wanted, number, LARGEST_DEGREE)
    below = next(degree for degree in range(start, 0, -1) if number % degree == 0)
    above = next((degree for degree in range(start, min(number, 2 * start) + 1) if number % degree == 0), below)
    return (str(below),) if above == below else (str(below), str(above))


def check_resources(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str]) -> list[Problem]:
    """Nodes, ranks, partition and time against the profile."""
    problems = []
    ask = run.slurm

    def wrong(leaf: str, what: str, value: object, choices: tuple[str, ...] = (), hint: str = "") -> None:
        problems.append(Problem(f"slurm.{leaf}: {what}", where.get(leaf, ""), str(value), choices, hint))

    partition = ask.partition or cluster.partition
    limits = cluster.partitions.get(partition) if partition else None
    if partition and cluster.partitions and limits is None:
        guess = near(partition, cluster.partitions)
        wrong("partition", f"{cluster.name} has no such partition", partition, tuple(sorted(cluster.partitions)),
              f"did you mean {guess}?" if guess else "")  # fmt: skip
    most = cluster.gpus_per_node or cluster.cores_per_node
    per_node = ask.nproc_per_node or most
    if per_node > most:
        unit, key = ("GPUs", "gpus_per_node") if cluster.gpus_per_node else ("cores", "cores_per_node")
        wrong("nproc_per_node", f"a node of {cluster.name} has {most} {unit}", per_node, (f"1 … {most}",),
              f"more nodes, or {key} in the cluster profile if it is wrong there")  # fmt: skip
    nodes = ask.nodes or 1
    bounds = [n for n in (cluster.max_nodes, limits.max_nodes if limits else None) if n is not None]
    if cluster.scheduler == "none" and nodes > 1:
        wrong("nodes", "this machine is one node", nodes, ("1",), "give a cluster profile: --cluster NAME")
    elif bounds and nodes > min(bounds):
        wrong("nodes", f"{partition or cluster.name} gives at most {min(bounds)} nodes to a job", nodes,
              (f"1 … {min(bounds)}",), _roomier(cluster, nodes))  # fmt: skip
    time = ask.time or cluster.time
    if limits and limits.max_time and time > limits.max_time:
        wrong(
            "time",
            f"{partition} allows at most {clock(limits.max_time)}",
            clock(time),
            hint="the run requeues itself at the limit and goes on",
        )
    problems += _prepare_job(cluster)
    if cluster.scheduler == "slurm" and time * 60 <= cluster.signal_lead + 60:
        wrong(
            "time",
            f"shorter than the warning of {cluster.signal_lead} s before its end and a minute to train",
            clock(time),
            hint="a longer time, or a shorter signal_lead in the cluster profile",
        )
    return problems


def _prepare_job(cluster: ClusterProfile) -> list[Problem]:
    """The job that prepares data, against the same profile."""
    ask = cluster.prepare_job
    if ask is None:
        return []
    if cluster.prepare != "job":
        hint = "write prepare: job, or take the section out"
        return [Problem(f"prepare_job says what a job asks for, but prepare is {cluster.prepare}", hint=hint)]
    limits = cluster.partitions.get(ask.partition) if ask.partition else None
    if ask.partition and cluster.partitions and limits is None:
        guess = near(ask.partition, cluster.partitions)
        hint = f"did you mean {guess}?" if guess else "add it to partitions"
        what = f"prepare_job.partition: {cluster.name} has no such partition"
        return [Problem(what, "", ask.partition, tuple(sorted(cluster.partitions)), hint)]
    if limits and limits.max_time and ask.time > limits.max_time:
        hint = "a preparation that ends at its limit goes on where it was when the run is submitted again"
        what = f"prepare_job.time: {ask.partition} allows at most {clock(limits.max_time)}"
        return [Problem(what, "", clock(ask.time), hint=hint)]
    return []


def _roomier(cluster: ClusterProfile, nodes: int) -> str:
    """The hint that names the partitions in which so many nodes may be had."""
    if cluster.max_nodes and nodes > cluster.max_nodes:
        return ""
    roomy = [name for name, limits in cluster.partitions.items() if limits.max_nodes and limits.max_nodes >= nodes]
    return f"so many are allowed in: {', '.join(sorted(roomy))}" if roomy else ""
