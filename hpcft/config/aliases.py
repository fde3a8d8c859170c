"""Words that people bring from other tools: other names for our leaves, and names that are refused or set aside.

One table each. An alias keeps its meaning exactly; where the value is spelt otherwise too, ``VALUES`` translates it.
"""

from __future__ import annotations

from typing import Any

# other name → our leaf
ALIASES: dict[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id_or_path": "model",
    "model_revision": "revision",
    "dtype": "torch_dtype",
    "bf16": "torch_dtype",
    "fp16": "torch_dtype",
    "attn_implementation": "attn_impl",
    "train_from_scratch": "from_scratch",
    "datasets": "dataset",
    "eval_dataset": "val_dataset",
    "validation_dataset": "val_dataset",
    "test_datasets": "val_dataset",
    "val_size": "split_dataset_ratio",
    "val_set_size": "split_dataset_ratio",
    "dataset_test_ratio": "split_dataset_ratio",
    "interleave_probs": "interleave_prob",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "seq_length": "max_length",
    "max_seq_length": "max_length",
    "excess_length_strategy": "truncation_strategy",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "template": "chat_template",
    "chat_template_path": "chat_template",
    "default_system": "system",
    "preprocessing_num_workers": "dataset_num_proc",
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "finetuning_type": "tuner_type",
    "adapter": "tuner_type",
    "lora_r": "lora_rank",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "additional_target": "modules_to_save",
    "lora_modules_to_save": "modules_to_save",
    "init_lora_weights": "init_weights",
    "num_epochs": "num_train_epochs",
    "train_batch_size": "global_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_decay_style": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "activation_checkpointing": "gradient_checkpointing",
    "recompute_granularity": "gradient_checkpointing",
    "full_determinism": "deterministic",
    "tp_size": "tp",
    "tensor_parallel_size": "tp",
    "tensor_model_parallel_size": "tp",
    "tensor_parallel_degree": "tp",
    "dp_replicate_size": "dp_replicate",
    "save_checkpoint_limit": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "run_name": "name",
    "job_name": "name",
    "stage": "task",
    "rlhf_type": "task",
    "nnodes": "nodes",
    "gpus_per_node": "nproc_per_node",
    "ntasks_per_node": "nproc_per_node",
    "time_limit": "time",
    "walltime": "time",
}

# our leaf → other spellings of its values
VALUES: dict[str, dict[Any, Any]] = {
    "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "target_modules": {"all": "all-linear"},
    "gradient_checkpointing": {True: "full", False: "none", "true": "full", "false": "none"},
    "truncation_strategy": {
        "delete": "drop",
        "left": "truncate_left",
        "right": "truncate_right",
        "truncate": "truncate_right",
    },
    "per_device_train_batch_size": {0: "auto", "0": "auto"},
    "lr_scheduler_type": {
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
    },
    "resume_from_checkpoint": {True: "auto", False: "none", "true": "auto", "false": "none"},
    "init_weights": {True: "true", False: "false"},
}

# name → why it has no effect here; it is accepted, and the sentence is printed once
SET_ASIDE: dict[str, str] = {
    "node_rank": "Slurm gives every rank its place",
    "master_addr": "the first node of the allocation is the meeting point",
    "master_port": "the port follows from the job",
    "overwrite_output_dir": "a run folder is never overwritten; give the run another name",
    "report_to": "metrics.jsonl and TensorBoard are always written",
    "logging_dir": "TensorBoard's files lie in the run folder",
    "use_cache": "training never uses the cache",
    "lazy_tokenize": "data is prepared before the job",
    "load_from_cache_file": "prepared data is found by its content",
    "do_train": "submit trains",
    "add_version": "a run is known by its name",
    "save_safetensors": "nothing else is written",
    "average_tokens_across_devices": "the loss is always the mean over all trained tokens",
}

_AXIS = "this release spreads data only: more ranks through nodes and nproc_per_node"
_QUANTISED = "this release trains LoRA on a bfloat16 base: torch_dtype: bfloat16"

# name → what to use instead; it is refused
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("pp", "pipeline_parallel_size", "pipeline_model_parallel_size", "pipeline_parallel_degree"), _AXIS
    ),
    **dict.fromkeys(
        ("cp", "cp_size", "context_parallel_size", "sequence_parallel_size", "context_parallel_degree"),
        "this release keeps a window on one rank: a smaller max_length, or truncation_strategy",
    ),
    **dict.fromkeys(("ep", "ep_size", "expert_model_parallel_size", "expert_parallel_degree"), _AXIS),
    **dict.fromkeys(
        ("quant_bits", "quant_method", "quantization_bit", "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype"),
        _QUANTISED,
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "zero_stage"),
        "this release runs strategy: ddp; with LoRA its optimizer memory is small",
    ),
    "streaming": "data is prepared on disk and read in place; `path#N` takes a part of it",
    "images": "this release trains text models",
    "freeze_vit": "this release trains text models",
    "reward_funcs": "this release has no online reinforcement learning; task: sft",
    "push_to_hub": "export writes a folder; upload it with: hf upload NAME FOLDER",
}

_TRUE = (True, "true", "True", "1", 1)


def rename(name: str, value: Any) -> tuple[str, Any]:
    """Our leaf and value for a name and value in anybody's spelling; unknown names come back as they are."""
    word = name.replace("-", "_")
    leaf = ALIASES.get(word, word)
    if word in ("bf16", "fp16"):  # a switch there, a value here
        value = {"bf16": "bfloat16", "fp16": "float16"}[word] if value in _TRUE or value == "auto" else "auto"
    return leaf, translate(leaf, value)


def translate(leaf: str, value: Any) -> Any:
    """``value`` in our spelling."""
    table = VALUES.get(leaf, {})
    if isinstance(value, (list, tuple)):
        return [table.get(item, item) if _plain(item) else item for item in value]
    return table.get(value, value) if _plain(value) else value


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int))
