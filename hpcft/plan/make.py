"""``make_plan``: the only place that decides. A run and a cluster in, a Plan out; it reads nothing else.

Neither Slurm, nor the environment, nor the home directory is looked at, so that the same two files give the same
Plan on every machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from hpcft import __version__
from hpcft.catalog import AUTO, DATA_FILES, OBJECTIVES, STRATEGIES
from hpcft.config.cluster import ClusterProfile, PrepareJob
from hpcft.config.run import Data, Model, RunConfig, Train
from hpcft.config.source import spoken
from hpcft.errors import Problem, Refusal, count, refuse
from hpcft.plan.auto import check_known, decide
from hpcft.plan.batch import plan_batch
from hpcft.plan.checks import check_home, check_mesh, check_resources, check_shape, check_words, home, uncompilable
from hpcft.plan.fabric import environment
from hpcft.plan.hardware import hardware
from hpcft.plan.layout import Layout, mesh
from hpcft.plan.objective import check_objective, plan_objective
from hpcft.plan.plan import (
    RECOMPUTATION,
    SCHEMA,
    Budgets,
    CheckpointPlan,
    DataPlan,
    Folders,
    ModelPlan,
    OptimPlan,
    Plan,
    PreparePlan,
    Resources,
    Source,
    TrainPlan,
    TunerPlan,
    Variable,
)
from hpcft.plan.prediction import Hardware
from hpcft.plan.shape import Shape
from hpcft.plan.ways import Question, Way

# Packed in a way that is not read, it is a file all the same, and what to do about it is said where it is read.
LIKE_A_FILE = re.compile(
    rf"({'|'.join(map(re.escape, (*DATA_FILES, '.txt')))})(\.(gz|zst|xz|bz2|zip))?$", re.IGNORECASE
)
MOST_NODES = 64  # looked at for the smallest layout, where the profile does not say how many there are

LARGEST_FACTOR = 1e30  # of an update; times another one it is past what float32 holds


def make_plan(
    run: RunConfig,
    cluster: ClusterProfile,
    origins: Mapping[str, str] | None = None,
    shape: Shape | None = None,
) -> Plan:
    """Decide everything. origins: leaf → ``file:line``, used in complaints only; shape: the model's, where it is known.

    Raises Refusal where the run and the cluster do not fit together, with every problem found, and where it is
    predicted that the model does not fit into its GPUs.
    """
    where = {leaf: origin for leaf, origin in (origins or {}).items() if origin != "default"}
    problems = [
        *check_words(run, where), *check_home(run, cluster, where), *check_mesh(run, cluster, where),
        *check_resources(run, cluster, where), *check_objective(run, where), *_check_parts(run, cluster),
        *_check_shape(run, where, shape),
    ]  # fmt: skip
    if problems:
        raise Refusal([_placed(problem, where) for problem in problems])
    try:
        return _decided(run, cluster, where, shape)
    except Refusal as refusal:
        raise Refusal([_placed(problem, where) for problem in refusal.problems]) from None


def _decided(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str], shape: Shape | None) -> Plan:
    """The strategy by memory and speed where it is to be chosen, and the prediction where there can be one."""
    on_cpus, auto, card = cluster.accelerator == "cpu", run.parallel.strategy == AUTO, hardware_of(cluster)
    if auto and not on_cpus:
        check_known(run.model.model, shape, card)
    # CPUs share one memory, of which nothing is known here; there auto is the simplest.
    wanted = Way("ddp" if auto and on_cpus else run.parallel.strategy, run.parallel.tp, run.parallel.dp_replicate)
    if on_cpus or shape is None:
        return _draft(run, cluster, where, wanted)
    return decide(question(run, cluster, where, shape), wanted)


def question(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str], shape: Shape) -> Question:
    """What ``decide`` decides: the run's Plan for any way to spread it, and what it may rest on."""
    train, card = run.train, hardware_of(cluster)
    known = card.gpu_bytes is not None
    return Question(
        draft=lambda way: _draft(run, cluster, where, way),
        shape=shape, hardware=card,
        spends=known and train.per_device_train_batch_size == "auto" and train.gradient_accumulation_steps is None,
        recomputation=RECOMPUTATION if known and train.gradient_checkpointing == AUTO else (_recomputation(train),),
        most=(cluster.max_nodes or MOST_NODES, cluster.gpus_per_node or 1),
    )  # fmt: skip


def hardware_of(cluster: ClusterProfile) -> Hardware:
    """What the profile says of cards, hosts and links."""
    return hardware(
        gpu_type=cluster.gpu_type, fabric=cluster.fabric, gpu_memory=cluster.gpu_memory,
        node_memory=cluster.node_memory, node_bandwidth=cluster.node_bandwidth,
        fabric_bandwidth=cluster.fabric_bandwidth,
    )  # fmt: skip


def _draft(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str], way: Way) -> Plan:
    """The Plan for one way to spread it, without its memory."""
    layout = _layout(run, cluster, way)
    train = run.train
    micro = None if train.per_device_train_batch_size == "auto" else train.per_device_train_batch_size
    return Plan(
        schema=SCHEMA,
        hpcft=__version__,
        name=run_name(run),
        model=_model(run.model, cluster),
        tuner=_tuner(run),
        data=_data(run, OBJECTIVES[run.task].rows),
        batch=plan_batch(
            data_parallel=layout.data_parallel,
            max_length=run.data.max_length,
            global_windows=train.global_batch_size,
            micro=micro,
            accumulation=train.gradient_accumulation_steps,
            eval_windows=train.per_device_eval_batch_size,
            where=where.get("global_batch_size", ""),
        ),
        optim=_optim(train, run.tuner.tuner_type),
        train=_train(run, way, cluster.accelerator),
        objective=plan_objective(run),
        checkpoint=_checkpoint(run),
        layout=layout,
        memory=None,
        resources=_resources(run, cluster, layout),
        budgets=Budgets(failures=run.slurm.max_failures, time_limits=run.slurm.max_time_limits, without_progress=3),
        environment=variables(cluster, layout, run.data.dataloader_num_workers),
        folders=Folders(runs=home(_runs(run, cluster, where)), store=home(cluster.store)),
    )


def _check_shape(run: RunConfig, where: Mapping[str, str], shape: Shape | None) -> list[Problem]:
    if shape is None:
        return []
    return check_shape(
        run, where, heads=shape.heads, kv_heads=shape.kv_heads, intermediate=shape.inner, experts=shape.experts
    )


def _check_parts(run: RunConfig, cluster: ClusterProfile) -> list[Problem]:
    """What is wrong inside the parts that can be made without a layout."""
    problems: list[Problem] = []
    for part in (lambda: _model(run.model, cluster), lambda: _data(run, ""), lambda: _checkpoint(run)):
        try:
            part()
        except Refusal as refusal:
            problems += refusal.problems
    return problems


def _placed(problem: Problem, where: Mapping[str, str]) -> Problem:
    """``problem`` with the origin of the leaf it is about: the last word before its colon."""
    leaf = problem.what.partition(":")[0].rpartition(".")[2]
    return problem if problem.where else dataclasses.replace(problem, where=where.get(leaf, ""))


def run_name(run: RunConfig) -> str:
    """The given name, else model and tuner: ``qwen2.5-7b-instruct-lora``."""
    if run.name:
        return run.name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(run.model.model.rstrip("/")).name).strip("-._").lower()
    return f"{stem or 'run'}-{run.tuner.tuner_type}"[:64]


def _layout(run: RunConfig, cluster: ClusterProfile, way: Way) -> Layout:
    nodes = way.nodes or run.slurm.nodes or 1
    per_node = way.ranks_per_node or run.slurm.nproc_per_node or cluster.gpus_per_node or 1
    return mesh(nodes, per_node, tp=way.tp, dp_replicate=way.dp_replicate)


def cpus_per_rank(cluster: ClusterProfile, layout: Layout) -> int:
    """A rank's share of the cores: by its GPUs' share of the node, so that a half-used node leaves half its cores."""
    share = cluster.gpus_per_node or layout.ranks_per_node
    return max(1, cluster.cores_per_node // max(share, layout.ranks_per_node))


def variables(cluster: ClusterProfile, layout: Layout, dataloader_workers: int) -> tuple[Variable, ...]:
    """The environment of the ranks."""
    return environment(
        fabric=cluster.fabric, accelerator=cluster.accelerator, interface=cluster.interface, ib_hcas=cluster.ib_hcas,
        nodes=layout.nodes, cpus_per_rank=cpus_per_rank(cluster, layout), dataloader_workers=dataloader_workers,
        hf_home=cluster.hf_home and home(cluster.hf_home), node_cache=home(cluster.node_cache), own=cluster.environment,
    )  # fmt: skip


def source_of(name: str, use_hf: bool) -> str:
    """Where a name is from. A path starts with / . ~ or $, ends like a data file, or is no ``owner/name``."""
    modelscope = ("AI-ModelScope/", "swift/", "LLM-Research/", "modelscope/", "iic/")
    is_file = re.match(r"[/.~$]", name) or LIKE_A_FILE.search(name)
    if is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return "local"
    return "modelscope" if name.startswith(modelscope) or not use_hf else "huggingface"


def _model(model: Model, cluster: ClusterProfile) -> ModelPlan:
    source = source_of(model.model, model.use_hf)
    on_cpus = cluster.accelerator == "cpu" and model.main_params_dtype == "float32"
    default = "float32" if on_cpus else "bfloat16"
    if model.trust_remote_code and source != "local" and not model.revision:
        raise refuse("model.trust_remote_code: runs code from the hub, so the revision must be pinned",
                     value=model.model, hint="add revision: COMMIT")  # fmt: skip
    return ModelPlan(
        path=model.model, source=source, revision=model.revision, from_scratch=model.from_scratch,
        dtype=default if model.torch_dtype == "auto" else model.torch_dtype,
        attention=model.attn_impl, trust_remote_code=model.trust_remote_code,
        quantization="nf4" if model.quant_bits else model.base_precision or "none",
        main_params_dtype=model.main_params_dtype,
    )  # fmt: skip


def _tuner(run: RunConfig) -> TunerPlan:
    tuner = run.tuner
    return TunerPlan(
        kind=tuner.tuner_type, rank=tuner.lora_rank, alpha=tuner.lora_alpha, dropout=tuner.lora_dropout,
        target_modules=tuner.target_modules, modules_to_save=tuner.modules_to_save, bias=tuner.lora_bias,
        use_rslora=tuner.use_rslora, use_dora=tuner.use_dora, init_lora_weights=tuner.init_weights,
    )  # fmt: skip


def _data(run: RunConfig, rows: str) -> DataPlan:
    data, model = run.data, run.model
    source = source_of(model.model, model.use_hf)
    return DataPlan(
        train=_sources(data, data.dataset, data.interleave_prob, model.use_hf),
        validation=_sources(data, data.val_dataset, (), model.use_hf),
        validation_ratio=data.split_dataset_ratio,
        tokenizer=model.model, tokenizer_source=source, tokenizer_revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template=data.chat_template, system=data.system,
        model_name=data.model_name, model_author=data.model_author,
        train_on="all" if run.task == "pretrain" else data.train_on, max_length=data.max_length,
        truncation=_truncation(run), packing=data.packing,
        seed=run.train.seed if data.data_seed is None else data.data_seed,
        max_untrained_rows=data.max_untrained_rows, rows=rows, num_labels=data.num_labels or 0,
        workers=data.dataset_num_proc,
    )  # fmt: skip


def _truncation(run: RunConfig) -> str:
    """As was said; else texts that are trained whole are split, for a long one is as good as many short ones."""
    return run.data.truncation_strategy or ("split" if run.task == "pretrain" else "drop")


def _sources(data: Data, names: tuple[str, ...], weights: tuple[float, ...], use_hf: bool) -> tuple[Source, ...]:
    if weights and len(weights) != len(names):
        raise refuse(
            f"data.interleave_prob: {count(len(weights), 'weight')} for {count(len(names), 'dataset')}",
            value=" ".join(map(str, weights)),
            hint="give one per dataset",
        )
    return tuple(_source(name, weights[i] if weights else None, use_hf) for i, name in enumerate(names))


def _source(name: str, weight: float | None, use_hf: bool) -> Source:
    """``path#500``, ``owner/name:subset#500``, and ms-swift's ``HF::`` and ``MS::`` in front."""
    text, rows = name, None
    if match := re.fullmatch(r"(.+)#([^/#]*)", name):
        text = match[1]
        if not re.fullmatch(r"[0-9]{1,12}", match[2]) or int(match[2]) < 1:
            file = re.sub(r"(#[0-9]*)+$", "", text)
            raise refuse("data.dataset: the part after # is a number of rows", value=name, hint=f"write {file}#500")
        rows = int(match[2])
    for prefix, hub in (("HF::", True), ("MS::", False)):
        if text.startswith(prefix):
            text, use_hf = text[len(prefix) :], hub
    source = source_of(text, use_hf)
    subset = None
    if source != "local" and ":" in text:
        text, _, subset = text.partition(":")
    return Source(path=text, rows=rows, source=source, subset=subset, weight=weight)


def _optim(train: Train, kind: str) -> OptimPlan:
    for leaf in ("learning_rate", "weight_decay", "adam_epsilon"):
        if (value := getattr(train, leaf) or 0.0) > LARGEST_FACTOR:
            raise refuse(f"train.{leaf}: too large: an update would be past what float32 holds", value=spoken(value))
    return OptimPlan(
        learning_rate=train.learning_rate or (1e-4 if kind == "lora" else 1e-5),
        schedule=train.lr_scheduler_type, warmup_steps=train.warmup_steps, warmup_ratio=train.warmup_ratio,
        min_lr_ratio=train.min_lr_ratio, decay_ratio=train.lr_decay_ratio, weight_decay=train.weight_decay,
        beta1=train.adam_beta1, beta2=train.adam_beta2, epsilon=train.adam_epsilon, max_grad_norm=train.max_grad_norm,
        num_train_epochs=train.num_train_epochs, max_steps=train.max_steps or -1,
    )  # fmt: skip


def _train(run: RunConfig, way: Way, accelerator: str) -> TrainPlan:
    train, strategy = run.train, way.strategy
    evaluates = bool(run.data.val_dataset or run.data.split_dataset_ratio)
    every = run.checkpoint.save_steps if train.eval_steps is None else train.eval_steps
    return TrainPlan(
        objective=run.task, objective_module=OBJECTIVES[run.task].module,
        strategy=strategy, strategy_module=STRATEGIES[strategy].module,
        deepspeed=(run.parallel.deepspeed or "") if strategy.startswith("zero") else "",
        seed=train.seed, deterministic=train.deterministic, recomputation=_recomputation(train),
        compiled=_compiled(run, way, accelerator), resharding=True,
        loss_chunk=0 if train.loss_chunk == "auto" else train.loss_chunk,
        nonfinite=train.nonfinite, logging_steps=train.logging_steps, eval_steps=every if evaluates else -1,
        early_stopping_patience=train.early_stopping_patience,
        dataloader_workers=run.data.dataloader_num_workers, collective_timeout=train.ddp_timeout,
    )  # fmt: skip


def _compiled(run: RunConfig, way: Way, accelerator: str) -> bool:
    """As was said; for auto where it pays: not where half-empty windows would be filled with padding.

    Nor where every number has to come out the same again: which of several programs is taken may follow from a
    stopwatch. Raises Refusal where it was asked for and cannot be.
    """
    problems = [problem for _, problem in uncompilable(way.strategy)]
    if run.train.torch_compile is True and problems:
        raise Refusal(problems)
    if run.train.torch_compile != AUTO:
        return run.train.torch_compile is True
    return accelerator == "cuda" and run.data.packing and not run.train.deterministic and not problems


def _recomputation(train: Train) -> str:
    """What was said; for auto the most, which ``Question.fitted`` lowers where it can."""
    return RECOMPUTATION[-1] if train.gradient_checkpointing == AUTO else train.gradient_checkpointing


def _checkpoint(run: RunConfig) -> CheckpointPlan:
    checkpoint = run.checkpoint
    if not (run.data.val_dataset or run.data.split_dataset_ratio):
        for leaf, wanted in (("load_best_model_at_end", checkpoint.load_best_model_at_end),
                             ("early_stopping_patience", run.train.early_stopping_patience)):  # fmt: skip
            if wanted:
                raise refuse(f"{leaf}: there is nothing to evaluate on", value=spoken(wanted),
                             hint="add val_dataset, or split_dataset_ratio: 0.02")  # fmt: skip
    return CheckpointPlan(
        save_steps=checkpoint.save_steps, keep=checkpoint.save_total_limit,
        load_best_at_end=checkpoint.load_best_model_at_end, resume=checkpoint.resume_from_checkpoint,
    )  # fmt: skip


def _runs(run: RunConfig, cluster: ClusterProfile, where: Mapping[str, str]) -> str:
    said = "output_dir" in where or run.checkpoint.output_dir != "runs"
    return run.checkpoint.output_dir if said or not cluster.runs else cluster.runs


def memory_of(cluster: ClusterProfile, layout: Layout, exclusive: bool) -> str | None:
    """All memory of a node goes with all of its GPUs only: half a node's job would keep others off the other half."""
    whole = exclusive or layout.ranks_per_node >= cluster.gpus_per_node
    return cluster.mem if whole or cluster.mem != "0" else None


def _resources(run: RunConfig, cluster: ClusterProfile, layout: Layout) -> Resources:
    ask = run.slurm
    partition = ask.partition or cluster.partition
    exclusive = cluster.exclusive if ask.exclusive is None else ask.exclusive
    return Resources(
        cluster=cluster.name, scheduler=cluster.scheduler, job_name=run_name(run), partition=partition,
        account=ask.account or cluster.account, qos=ask.qos or cluster.qos,
        constraint=ask.constraint or cluster.constraint, reservation=ask.reservation,
        nodes=layout.nodes, tasks_per_node=layout.ranks_per_node, cpus_per_task=cpus_per_rank(cluster, layout),
        gpus_per_node=layout.ranks_per_node if cluster.gpus_per_node else 0, gpu_type=cluster.gpu_type,
        gpu_request=cluster.gpu_request if cluster.gpus_per_node else "none",
        memory=ask.mem or memory_of(cluster, layout, exclusive), exclusive=exclusive,
        time_minutes=ask.time or cluster.time, signal_lead=cluster.signal_lead, requeue=True,
        preemption=_preemption(cluster, partition), extra=cluster.extra, setup=cluster.setup,
        launcher=cluster.launcher, accelerator=cluster.accelerator,
        backend="gloo" if cluster.accelerator == "cpu" else "nccl", prepare=cluster.prepare, template=cluster.template,
        prepare_job=_prepare_job(cluster, partition),
    )  # fmt: skip


def _prepare_job(cluster: ClusterProfile, partition: str | None) -> PreparePlan | None:
    if cluster.prepare != "job" or cluster.scheduler == "none":
        return None
    ask = cluster.prepare_job or PrepareJob()
    return PreparePlan(
        partition=ask.partition or partition, qos=ask.qos, cores=ask.cores, memory=ask.mem, time_minutes=ask.time,
        extra=ask.extra,
    )  # fmt: skip


def _preemption(cluster: ClusterProfile, partition: str | None) -> str:
    """What the profile says of the partition; where it says nothing, that a job may be put back into the queue."""
    if cluster.scheduler == "none":
        return "none"
    limits = cluster.partitions.get(partition or "")
    return limits.preemption if limits else "requeue"
