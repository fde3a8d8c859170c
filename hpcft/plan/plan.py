"""The Plan: everything that was decided, as one frozen value; the only thing that crosses the queue.

Standard library only: the ranks, the batch shell's helpers and the login node all read it. Every path in it is
relative to the directory the job was submitted from, or absolute, or starts with a shell variable that the
cluster profile asked for; no home directory, no date and no secret is ever in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.catalog import OBJECTIVES
from hpcft.errors import refuse
from hpcft.plan.layout import Axis, Layout
from hpcft.plan.prediction import MemoryPlan
from hpcft.plan.schema import READABLE_SCHEMAS, SCHEMA, build, upgraded

QUANTISED = {"nf4": "4 bits (NormalFloat, double quantisation)", "fp8": "8-bit floats (e4m3, a scale for each row)"}
RECOMPUTATION = ("none", "selective", "full")  # of activations, the least first


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The base model. path: a folder or a hub id; revision: pinned by submit for hub ids; source: where it is from.

    dtype: compute type of the forward and backward pass. main_params_dtype: of trained weights as they are kept, and
    of AdamW's moments; bfloat16 where a model that is trained whole has no float32 masters.
    """

    path: str
    source: str  # local | huggingface | modelscope
    revision: str | None
    from_scratch: bool
    dtype: str  # bfloat16 | float16 | float32
    attention: str  # auto | sdpa | eager | flash_attention_2
    trust_remote_code: bool
    quantization: str  # of the frozen base: none, or one of QUANTISED
    main_params_dtype: str  # float32 | bfloat16


@dataclass(frozen=True, kw_only=True)
class TunerPlan:
    """What is trained: every weight (kind ``full``), or LoRA adapters as peft makes them (kind ``lora``)."""

    kind: str  # full | lora
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # ("all-linear",) or module name endings
    modules_to_save: tuple[str, ...]
    bias: str  # none | all | lora_only
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str  # true | false | gaussian | pissa | olora …

    @property
    def drops_out(self) -> bool:
        """Is there dropout? Its key has a value without adapters, too."""
        return self.kind != "full" and self.dropout > 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset: a file or hub name, and how many rows of it (None: all; more than it has: whole passes repeated)."""

    path: str
    rows: int | None = None
    source: str = "local"  # local | huggingface | modelscope
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    weight: float | None = None  # share of the mix when every source of the run has one


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The data request: with the files' content it fixes the prepared shards byte for byte."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    validation_ratio: float  # share of train rows set aside when ``validation`` is empty
    tokenizer: str
    tokenizer_source: str
    tokenizer_revision: str | None
    trust_remote_code: bool
    chat_template: str | None  # None: the tokenizer's own; else a file or a name
    system: str | None
    model_name: str | None  # replaces {{NAME}} in rows, model_author replaces {{AUTHOR}} (self-cognition data)
    model_author: str | None
    train_on: str  # assistant | last_turn | all: which tokens carry loss
    max_length: int  # tokens in a window
    truncation: str  # drop | truncate_left | truncate_right | split (of raw text)
    packing: bool
    seed: int
    max_untrained_rows: float  # refuse when a larger share of rows has no trained token
    rows: str  # the kind of row the objective needs: chat | pair | rated | labelled
    num_labels: int  # classes of labelled rows; 0: as many as the data has
    workers: int


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """global_windows = micro_windows × accumulation × data-parallel ranks."""

    global_windows: int
    micro_windows: int
    accumulation: int
    eval_windows: int  # windows per rank and forward pass in evaluation


@dataclass(frozen=True, kw_only=True)
class OptimPlan:
    """AdamW and its schedule. max_steps wins over num_train_epochs when it is positive."""

    learning_rate: float
    schedule: str  # linear | cosine | constant | wsd
    warmup_steps: int  # used when positive, else warmup_ratio × steps
    warmup_ratio: float
    min_lr_ratio: float  # floor of the decay as a share of learning_rate
    decay_ratio: float  # wsd: share of the steps that decays at the end
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float  # 0: never clip
    num_train_epochs: float
    max_steps: int  # -1: epochs decide


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The rules of the loop. Steps are optimizer steps."""

    objective: str
    objective_module: str
    strategy: str
    strategy_module: str
    deepspeed: str  # what a DeepSpeed file of the user's adds to ours, as canonical JSON; "" for none
    seed: int
    deterministic: bool
    recomputation: str  # one of RECOMPUTATION
    compiled: bool  # each decoder layer
    resharding: bool  # fsdp: layers let their gathered weights go between the forward and the backward pass
    loss_chunk: int  # trained tokens whose logits exist at a time; 0: as many as make half a GiB of them
    nonfinite: str  # stop | skip
    logging_steps: int
    eval_steps: int  # 0: only at the end of each epoch; -1: never
    early_stopping_patience: int  # evaluations without improvement; 0: off
    dataloader_workers: int
    collective_timeout: int  # seconds


@dataclass(frozen=True, kw_only=True)
class ObjectivePlan:
    """The settings of the objective's formula, which its module explains; neutral where it does not look at them."""

    beta: float
    loss_type: str
    label_smoothing: float
    rpo_alpha: float
    desirable_weight: float
    undesirable_weight: float
    simpo_gamma: float
    cpo_alpha: float
    center_rewards_coefficient: float
    reference: str  # none | adapters_off | precompute: where the model as it was before training comes from
    labels: tuple[str, ...]  # names of the classes; filled in by the ranks, from the prepared data


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """save_steps 0: only at the end and when stopped. keep: verified checkpoints kept beside the best one."""

    save_steps: int
    keep: int
    load_best_at_end: bool
    resume: str  # auto | none | a checkpoint folder of another run


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One exported environment variable and the reason for it; ``value`` may name other variables as ${NAME}."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PreparePlan:
    """The job that prepares the data before the ranks' job starts: one task on one node, without GPUs."""

    partition: str | None
    qos: str | None
    cores: int  # as many processes prepare
    memory: str | None
    time_minutes: int
    extra: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What is asked of Slurm, and how the ranks are started there."""

    cluster: str
    scheduler: str  # slurm | none
    job_name: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    reservation: str | None
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int  # 0: a CPU run
    gpu_type: str | None
    gpu_request: str  # gres | gres_typed | gpus_per_node | none
    memory: str | None  # as Slurm takes it: "0" (all of the node), "64G"
    exclusive: bool
    time_minutes: int
    signal_lead: int  # seconds before the end at which USR2 comes
    requeue: bool
    preemption: str  # requeue | cancel | none
    extra: tuple[str, ...]  # further sbatch options, each checked: "--mail-type=END"
    setup: tuple[str, ...]  # shell lines from the profile: modules, conda, venv
    launcher: str  # srun (a task per rank) | torchrun (a task per node)
    accelerator: str  # cuda | rocm | cpu
    backend: str  # nccl | gloo
    prepare: str  # login | in_job | job
    template: str | None  # a template of the user's own
    prepare_job: PreparePlan | None  # where prepare is job


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """How often an attempt may end badly before the run stops. Preemptions are not limited."""

    failures: int
    time_limits: int
    without_progress: int  # attempts in a row that end without a new checkpoint


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where things go. ``runs`` and ``store`` are relative to the submit directory unless they begin with / or $."""

    runs: str
    store: str  # prepared shards, content-addressed, shared by runs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, decided. Same Plan → same script bytes, same data order, same losses."""

    schema: int
    hpcft: str
    name: str
    model: ModelPlan
    tuner: TunerPlan
    data: DataPlan
    batch: BatchPlan
    optim: OptimPlan
    train: TrainPlan
    objective: ObjectivePlan
    checkpoint: CheckpointPlan
    layout: Layout
    memory: MemoryPlan | None  # None on CPUs, and where the model's config.json could not be read
    resources: Resources
    budgets: Budgets
    environment: tuple[Variable, ...]
    folders: Folders

    def to_json(self) -> str:
        """The canonical text: keys in declaration order, two spaces, a newline at the end."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @property
    def scored(self) -> bool:
        """Does the model give scores of a text (a reward, classes), in the place of its next token's probabilities?"""
        return OBJECTIVES[self.train.objective].head == "score"

    @property
    def number(self) -> str:
        """What the numbers are called that the model gives."""
        return "score" if self.labelled else "reward" if self.scored else "logit"

    @property
    def labelled(self) -> bool:
        """Are the scores those of classes?"""
        return OBJECTIVES[self.train.objective].rows == "labelled"

    def with_labels(self, names: Sequence[str]) -> Plan:
        """The same where the classes are known."""
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, labels=tuple(names)))

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of SHA-256 over the canonical text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def only_merged(self) -> bool:
        """Whether an export must be the whole model: adapters on random weights, which are written nowhere else."""
        return self.tuner.kind != "full" and self.model.from_scratch

    @classmethod
    def from_json(cls, text: str, where: str = "plan.json") -> Plan:
        """Read a Plan. Raises Refusal where the text is not one, or of a schema this release does not read."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise refuse(f"not a Plan: {error}", where=where) from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema not in READABLE_SCHEMAS:
            raise refuse(
                f"this release of hpcft does not read a Plan of schema {schema!r}",
                where=where,
                choices=READABLE_SCHEMAS,
                hint="render it anew from its YAML: hpcft render RUN.yaml",
            )
        try:
            return build(cls, upgraded(data))
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"not a whole Plan: {error}", where=where) from error


def data_key(data: DataPlan) -> str:
    """Sixteen hexadecimal digits that name a data request: everything that shapes the shards but the files' content.

    ``workers`` is left out: the shards are the same for any number of workers.
    """
    request = {**dataclasses.asdict(data), "workers": None}
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


__all__ = ["SCHEMA", "Axis", "Layout", "Plan", "data_key"]
