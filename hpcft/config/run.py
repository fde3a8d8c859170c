"""What a person may say about a run: sections of leaves, every leaf name unique.

A field's description is its help text, its line in the reference page, its entry in the JSON schema and its
comment in the starter YAML. Names are those of Hugging Face's TrainingArguments and ms-swift where one exists.
A default of None means "the Plan decides", and the description says how.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from hpcft import catalog
from hpcft.catalog import OBJECTIVES, STRATEGIES, Strategy
from hpcft.config.fields import Features, Fraction, Line, Minutes, Name, Text, Word

NEEDS_A_VALUE = "needs a value"


def _rows(table: Mapping[str, Strategy] | Mapping[str, catalog.Objective]) -> str:
    """A table of the catalog as a sentence, so that a new row is explained wherever the key is."""
    return "; ".join(f"{row.name}: {row.about}" for row in table.values()) + "."


class Section(BaseModel):
    """A group of leaves; frozen, and an unknown key is an error."""

    # defer_build: built once, when used
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1: ``--learning_rate`` with its value forgotten would train at a rate of 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *typing.get_args(kind)):
            raise ValueError(NEEDS_A_VALUE)
        return value

    @field_validator("*")
    @classmethod
    def _fits_into_json(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**53:
            raise ValueError("must be below 2^53, the largest number that every JSON reader keeps exactly")
        return value


class Model(Section):
    """The base model."""

    model: Line = Field(
        min_length=1, description="Folder, or name on the Hugging Face hub (AI-ModelScope/… : ModelScope)."
    )
    revision: Word | None = Field(None, description="Branch, tag or commit of a hub model; submit pins it to a commit.")
    use_hf: bool = Field(
        True, description="false: names are looked up on ModelScope (needs its package) instead of Hugging Face."
    )
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Compute type; auto: bfloat16 on GPUs and where main_params_dtype says it, float32 on CPUs.",
    )
    main_params_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of trained weights between steps, and of AdamW's moments. bfloat16: without float32 masters, "
        "for tuner_type full: 8 bytes a weight instead of 18, and updates below 1/256 of a weight are lost.",
    )
    attn_impl: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel. auto: the fastest that the first attempt finds on its GPUs."
    )
    from_scratch: bool = Field(False, description="Start from random weights of the model's configuration.")
    quant_bits: Literal[4] | None = Field(
        None, description="4: the frozen base in 4-bit NormalFloat, for LoRA (QLoRA). null: in torch_dtype."
    )
    base_precision: Literal["fp8"] | None = Field(
        None,
        description="fp8: the frozen base in 8-bit floats, for LoRA on H100 and later: half its memory, and faster. "
        "null: in torch_dtype.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that the model's folder brings. Only with a pinned revision."
    )


class Data(Section):
    """What it learns from; prepared once, on CPUs, before GPUs are held."""

    dataset: tuple[Line, ...] = Field(
        min_length=1,
        description="Files (jsonl, json, csv, parquet) or hub names; `path#500` takes 500 rows. Shape: by keys.",
    )
    val_dataset: tuple[Line, ...] = Field((), description="Evaluation data, written like `dataset`.")
    split_dataset_ratio: float = Field(
        0.0, ge=0, lt=1, description="Without val_dataset: this share of rows is set aside for evaluation."
    )
    interleave_prob: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="Mixing weights, one per dataset; empty: the datasets are joined as they are."
    )
    max_length: int = Field(2048, ge=2, description="Tokens in a window: the longest record, or the pack of several.")
    truncation_strategy: Literal["drop", "truncate_left", "truncate_right", "split"] | None = Field(
        None,
        description="What happens to a record longer than max_length; what is lost is counted. split, for pretrain: a "
        "raw text becomes several records, a chat is dropped. null: drop; pretrain: split.",
    )
    packing: bool = Field(True, description="Fill each window with several whole records; they do not see each other.")
    chat_template: Line | None = Field(
        None, description="A jinja file or `chatml`. null: the tokenizer's own template."
    )
    system: Text | None = Field(None, description="System message for records that have none.")
    train_on: Literal["assistant", "last_turn", "all"] = Field(
        "assistant", description="Which tokens are trained: every assistant turn, only the last one, or all tokens."
    )
    max_untrained_rows: Fraction = Field(
        0.05, description="Refuse data where more than this share of rows has nothing to train on."
    )
    num_labels: int | None = Field(
        None, ge=2, le=4096, description="seq_cls: how many classes there are. null: as many as the data's labels name."
    )
    model_name: Line | None = Field(None, description="Replaces {{NAME}} in records (self-cognition data).")
    model_author: Line | None = Field(None, description="Replaces {{AUTHOR}} in records (self-cognition data).")
    data_seed: int | None = Field(None, ge=0, description="Seed of sampling and packing. null: `seed`.")
    dataset_num_proc: int = Field(
        1, ge=1, le=256, description="Processes that prepare the data; the result is the same for any number."
    )
    dataloader_num_workers: int = Field(2, ge=0, le=64, description="Threads per rank that read windows ahead.")


class Tuner(Section):
    """What is trained: adapters or every weight."""

    tuner_type: Literal["lora", "full"] = Field(
        "lora", description="lora: small adapters on a frozen model; full: every weight."
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(32, gt=0, description="Adapters are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: tuple[Word, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="Modules that get an adapter: all-linear, or name endings such as q_proj v_proj.",
    )
    modules_to_save: tuple[Word, ...] = Field(
        (), description="Modules trained in full beside the adapters, such as embed_tokens."
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(lora_rank).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    init_weights: Literal["true", "false", "gaussian", "pissa", "olora", "orthogonal"] = Field(
        "true", description="How adapters start, in peft's words."
    )


class Train(Section):
    """Batch, optimizer, schedule and the rules of the loop."""

    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data; max_steps wins where it is set.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps in all; -1: num_train_epochs decides.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Windows per optimizer step over all ranks. null: micro batch × accumulation × ranks."
    )
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Windows per rank and forward pass; auto (or 0) changes speed and memory, never the result."
    )
    gradient_accumulation_steps: int | None = Field(
        None, ge=1, description="Forward passes per optimizer step. null: it follows."
    )
    per_device_eval_batch_size: int = Field(1, ge=1, description="Windows per rank and forward pass in evaluation.")
    learning_rate: float | None = Field(None, gt=0, description="Peak rate. null: 1e-4 for lora, 1e-5 for full.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="Shape after warm-up."
    )
    warmup_ratio: Fraction = Field(
        0.03, description="Share of the steps that warms up; warmup_steps wins where it is set."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps that warm up.")
    min_lr_ratio: Fraction = Field(0.0, description="The schedule ends at this share of learning_rate.")
    lr_decay_ratio: Fraction = Field(0.1, description="wsd: the share of steps that decays at the end.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decay, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this global norm; 0: never.")
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, about a third slower when full. "
        "auto: as little as the GPU's memory allows; full where that or the model is not known.",
    )
    torch_compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile each decoder layer: a third faster after half a minute at the start. Windows are padded "
        "to max_length, so pack them. auto: on NVIDIA's GPUs, where it can be and packing is on.",
    )
    loss_chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Trained tokens whose logits exist at a time. Where the head is trained its gradient is read and "
        "written once a chunk. auto: half a GiB of logits; up to 2 GiB where the GPU has room and the head is trained.",
    )
    seed: int = Field(42, ge=0, description="Data order, initial adapters and dropout follow from it.")
    deterministic: bool = Field(False, description="Bitwise repeatable on GPUs, at some cost of speed.")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: stop, or skip that step and count it."
    )
    logging_steps: int = Field(1, ge=1, description="A line of metrics every so many optimizer steps.")
    eval_steps: int | None = Field(
        None, ge=-1, description="Evaluate every so many steps; 0: at epoch ends; -1: never. null: as save_steps."
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="Stop after so many evaluations without improvement; 0: off."
    )
    ddp_timeout: int = Field(1800, ge=10, description="Seconds after which a collective that hangs ends the attempt.")


class Objective(Section):
    """The settings of a preference objective's formula; docs/guides/preference.md has the formulas."""

    beta: float | None = Field(
        None, gt=0, description="How strongly it holds to its start, or the scale of rewards. null: 0.1; simpo: 2."
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm"] | None = Field(
        None, description="dpo and cpo: the loss of a pair. null: sigmoid; cpo knows sigmoid and hinge."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="The share of pairs that are taken to be the wrong way round."
    )
    rpo_alpha: float | None = Field(
        None, ge=0, description="dpo: weight of the chosen answers' cross entropy beside the loss. null: 0."
    )
    desirable_weight: float = Field(1.0, ge=0, description="kto: weight of the good answers.")
    undesirable_weight: float = Field(1.0, ge=0, description="kto: weight of the bad answers.")
    simpo_gamma: float = Field(1.0, ge=0, description="simpo: the margin between both answers' rewards.")
    cpo_alpha: float | None = Field(
        None, ge=0, description="Weight of the chosen answers' cross entropy. null: 1 for cpo, 0 for simpo."
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="rm: weight of the square of both rewards' sum, which holds their middle at 0."
    )
    reference: Literal["auto", "adapters_off", "precompute"] = Field(
        "auto",
        description="dpo, kto: the model at its start. adapters_off: the one in memory, without its adapters; "
        "precompute: its numbers from a pass of their own before the first step. auto: the former where it is right.",
    )


class Parallel(Section):
    """How the model is spread over ranks."""

    strategy: Word = Field("ddp", description="auto: the fastest that fits; " + _rows(STRATEGIES))
    tp: int = Field(1, ge=1, description="Tensor-parallel degree, inside a node.")
    dp_replicate: int = Field(1, ge=1, description="Replicas of a sharded model, over nodes first (HSDP); with fsdp.")
    deepspeed: Text | None = Field(
        None,
        description="zero0 … zero3, zero2_offload, zero3_offload, or a DeepSpeed JSON file: it names the strategy.",
    )


class Checkpoint(Section):
    """Saving and coming back."""

    output_dir: Line = Field(
        "runs", min_length=1, description="Where run folders lie; relative to the submit directory."
    )
    save_steps: int = Field(
        500, ge=0, description="A checkpoint every so many optimizer steps; 0: only at the end and when stopped."
    )
    save_total_limit: int = Field(2, ge=1, description="Verified checkpoints that are kept, beside the best one.")
    load_best_model_at_end: bool = Field(
        False, description="Export the checkpoint with the lowest evaluation loss, not the last."
    )
    resume_from_checkpoint: Line = Field(
        "auto", description="auto: the newest that verifies; none: start anew; or a checkpoint folder."
    )


class Slurm(Section):
    """What is asked of the cluster; null: the cluster profile's value."""

    nodes: int | None = Field(None, ge=1, description="Nodes. null: 1.")
    nproc_per_node: int | None = Field(
        None, ge=1, description="Ranks per node: GPUs on a GPU cluster. null: all GPUs of a node."
    )
    time: Minutes | None = Field(None, description="Time limit: minutes, 4:00:00, 2-00:00:00 or 1h30m.")
    partition: Word | None = Field(None, description="Partition.")
    account: Word | None = Field(None, description="Account that pays.")
    qos: Word | None = Field(None, description="Quality of service.")
    constraint: Features | None = Field(None, description="Node features.")
    reservation: Word | None = Field(None, description="Reservation.")
    mem: Word | None = Field(None, description='Memory per node in Slurm\'s words; "0" is all of it.')
    exclusive: bool | None = Field(None, description="Whole nodes.")
    max_failures: int = Field(3, ge=0, description="Attempts that may fail before the run stops; progress refills it.")
    max_time_limits: int = Field(100, ge=0, description="Time limits the run may run into and come back from.")


class RunConfig(Section):
    """One run: three words on top, then the sections."""

    name: Name | None = Field(None, description="Name of the run and its job. null: the file's name.")
    task: Word = Field("sft", description=_rows(OBJECTIVES))
    cluster: Line | None = Field(
        None, description="Cluster profile: a name or a YAML file. null: cluster.yaml beside you, else this machine."
    )
    model: Model
    data: Data
    tuner: Tuner = Field(default_factory=Tuner)
    train: Train = Field(default_factory=Train)
    objective: Objective = Field(default_factory=Objective)
    parallel: Parallel = Field(default_factory=Parallel)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    slurm: Slurm = Field(default_factory=Slurm)
