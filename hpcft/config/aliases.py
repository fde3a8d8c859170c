"""Words that people bring from other tools for what is a leaf here; ``declined`` has those for what is none.

One table each. An alias keeps its meaning exactly; where the value is spelt otherwise too, ``VALUES`` translates it;
where another tool has a switch for what is a value here, ``SWITCHES`` says which.
"""

from __future__ import annotations

import re
from typing import Any

from hpcft.config.datasets import dataset_words
from hpcft.config.declined import AXES, QUANTISED
from hpcft.errors import refuse

# other name → our leaf
ALIASES: dict[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_revision": "revision",
    "dtype": "torch_dtype",
    "attn_implementation": "attn_impl",
    "flash_attn": "attn_impl",
    "quantization_bit": "quant_bits",
    "train_from_scratch": "from_scratch",
    "datasets": "dataset",
    "dataset_name": "dataset",
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
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "excess_length_strategy": "truncation_strategy",
    "truncation_mode": "truncation_strategy",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "chat_template_path": "chat_template",
    "default_system": "system",
    "default_system_message": "system",
    "loss_scale": "train_on",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_processes": "dataset_num_proc",
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
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "train_batch_size": "global_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "local_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_decay_style": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "activation_checkpointing": "gradient_checkpointing",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "recompute_granularity": "gradient_checkpointing",
    "full_determinism": "deterministic",
    "tp_size": "tp",
    "tensor_parallel_size": "tp",
    "tensor_model_parallel_size": "tp",
    "tensor_parallel_degree": "tp",
    "dp_replicate_size": "dp_replicate",
    "mp_replicate_size": "dp_replicate",
    "deepspeed_config": "deepspeed",
    "ckpt_every_steps": "save_steps",
    "save_checkpoint_limit": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "auto_resume_from_checkpoints": "resume_from_checkpoint",
    "restore_from": "resume_from_checkpoint",
    "run_name": "name",
    "job_name": "name",
    "stage": "task",
    "rlhf_type": "task",
    "rl": "task",
    "pref_beta": "beta",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "kto_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_loss_type": "loss_type",
    "pref_ftx": "rpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "nnodes": "nodes",
    "num_nodes": "nodes",
    "gpus_per_node": "nproc_per_node",
    "ntasks_per_node": "nproc_per_node",
    "time_limit": "time",
    "walltime": "time",
}

# our leaf → other spellings of its values
VALUES: dict[str, dict[Any, Any]] = {
    "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "main_params_dtype": {"bf16": "bfloat16", "fp32": "float32"},
    "attn_impl": {"fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "disabled": "eager"},
    "quant_bits": {"4": 4},
    "strategy": {"fsdp2": "fsdp", "zero0": "ddp"},
    "chat_template": {"tokenizer_default": None},
    "task": {"pt": "pretrain", "reward": "rm", "reward_model": "rm"},
    "train_on": {"default": "assistant", "last_round": "last_turn"},
    "target_modules": {"all": "all-linear"},
    "gradient_checkpointing": {True: "full", False: "none"},
    "truncation_strategy": {
        "delete": "drop",
        "left": "truncate_left",
        "right": "truncate_right",
        "truncate": "truncate_right",
        "keep_start": "truncate_right",
        "keep_end": "truncate_left",
    },
    "per_device_train_batch_size": {0: "auto", "0": "auto"},
    "lr_scheduler_type": {
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "WSD": "wsd",
    },
    "resume_from_checkpoint": {True: "auto", False: "none"},
    "init_weights": {True: "true", False: "false"},
}

_Switch = dict[Any, tuple[str, Any] | None]
_BFLOAT16, _FLOAT16 = ("torch_dtype", "bfloat16"), ("torch_dtype", "float16")
_EVALUATION: _Switch = {"steps": None, "epoch": ("eval_steps", 0), "no": ("eval_steps", -1)}
_PROMPTS: _Switch = {True: ("train_on", "all"), False: None}
_ANSWERS: _Switch = {True: ("train_on", "assistant"), False: ("train_on", "all")}
_ALWAYS: _Switch = {True: None}
_NEVER: _Switch = {False: None}
_COMPUTE: _Switch = {
    **dict.fromkeys(("bfloat16", "bf16"), _BFLOAT16),
    **dict.fromkeys(("float16", "fp16"), _FLOAT16),
    **dict.fromkeys(("float32", "fp32"), ("torch_dtype", "float32")),
}
_METHOD: _Switch = {"bnb": None, "bitsandbytes": None}
_ADAMW: _Switch = dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"))

# another tool's switch → its value → our leaf and value; None: that is what is done anyway
SWITCHES: dict[str, _Switch] = {
    "bf16": {True: _BFLOAT16, "auto": _BFLOAT16, "full": _BFLOAT16, False: None},
    "fp16": {True: _FLOAT16, False: None},
    "pure_bf16": {True: ("main_params_dtype", "bfloat16"), False: None},
    "load_in_4bit": {True: ("quant_bits", 4), False: None},
    "quant_method": _METHOD,
    "quantization_method": _METHOD,
    "bnb_4bit_quant_type": {"nf4": None},
    "bnb_4bit_use_double_quant": {True: None},
    "double_quantization": {True: None},
    "bnb_4bit_compute_dtype": _COMPUTE,
    "use_peft": {True: ("tuner_type", "lora"), False: ("tuner_type", "full")},
    "lora_target_linear": {True: ("target_modules", ["all-linear"]), False: None},
    "disable_gradient_checkpointing": {
        True: ("gradient_checkpointing", "none"),
        False: ("gradient_checkpointing", "full"),
    },
    "flash_attention": {True: ("attn_impl", "flash_attention_2"), False: None},
    "sdp_attention": {True: ("attn_impl", "sdpa"), False: None},
    "eager_attention": {True: ("attn_impl", "eager"), False: None},
    "train_on_inputs": _PROMPTS,
    "train_on_prompt": _PROMPTS,
    "assistant_only_loss": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "mask_history": {True: ("train_on", "last_turn"), False: None},
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "save_strategy": {"steps": None, "no": ("save_steps", 0)},
    "logging_strategy": {"steps": None},
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "precompute_ref_log_probs": {True: ("reference", "precompute"), False: None},
    "task_type": {
        **dict.fromkeys(("seq_cls", "SEQ_CLS"), ("task", "seq_cls")),
        **dict.fromkeys(("causal_lm", "CAUSAL_LM")),
    },
    "problem_type": {"single_label_classification": None},
    "dataset_text_field": {"text": None},
    "use_chat_template": _ALWAYS,
    "tuner_backend": {"peft": None},
    **dict.fromkeys(("dataset_shuffle", "train_dataloader_shuffle", "shuffle_merged_datasets"), _ALWAYS),
    **dict.fromkeys(("strict", "greater_is_better", "xformers_attention", "s2_attention", "shift_attn"), _NEVER),
    "metric_for_best_model": dict.fromkeys(("loss", "eval_loss")),
}

# switch → our leaf and the value that it has not where the switch is off
DENIES: dict[str, tuple[str, Any]] = {
    "load_in_4bit": ("quant_bits", 4),
    "pure_bf16": ("main_params_dtype", "bfloat16"),
    "flash_attention": ("attn_impl", "flash_attention_2"),
    "train_on_inputs": ("train_on", "all"),
    "train_on_prompt": ("train_on", "all"),
}

# switch → the leaf without which it says nothing
NEEDS: dict[str, str] = dict.fromkeys(
    ("quant_method", "quantization_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "double_quantization"),
    "quant_bits",
)

# switch → what to use in place of a value that is not in its table
ALTERNATIVES: dict[str, str] = {
    **dict.fromkeys(("quant_method", "quantization_method"), "name the unquantised base model, with quant_bits: 4"),
    "task_type": "this release trains no embeddings and rerankers; task names what it does",
    "problem_type": "this release gives each text one of several classes",
    "bnb_4bit_quant_type": "nf4 is the better of the two for weights: leave it out",
    "dataset_text_field": "rename the column to text: a record's shape is found by its keys",
    "use_chat_template": "task: pretrain trains plain text, and train_on: all every token",
    "tuner_backend": "adapters are peft's",
    **dict.fromkeys(
        ("dataset_shuffle", "train_dataloader_shuffle", "shuffle_merged_datasets"),
        "each epoch has an order of its own, which follows from seed",
    ),
    "strict": "leave it out: a key that means nothing is refused anyway",
    "greater_is_better": "the best checkpoint is the one with the lowest loss: leave it out",
    **dict.fromkeys(
        ("xformers_attention", "s2_attention", "shift_attn"), "attn_impl names a kernel; auto is the fastest"
    ),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), "leave it out: the scales are quantised too"),
}

# Words that name a strategy between them, read together by config/sharding.py.
SHARDING: dict[str, str] = {
    "fsdp": "strategy: fsdp, with offload: fsdp_offload, no_shard: ddp; a file or map may say fsdp and fsdp_config",
    "fsdp_config": "strategy: fsdp or fsdp_offload; every other key of it is noted or refused",
    "fsdp_version": "strategy: fsdp, which is FSDP2",
    "fsdp_sharding_strategy": "strategy: fsdp, NO_SHARD: ddp",
    **dict.fromkeys(("fsdp_offload_params", "fsdp_cpu_offload"), "strategy: fsdp_offload"),
    "fsdp_reshard_after_forward": "strategy: fsdp; the plan decides when weights are let go",
    "fsdp_state_dict_type": "strategy: fsdp; checkpoints are hpcft's own",
    **dict.fromkeys(("fsdp_transformer_layer_cls_to_wrap", "fsdp_auto_wrap_policy", "fsdp_min_num_params"),
                    "strategy: fsdp; each decoder layer is wrapped, as the model names it"),
    "zero_stage": "strategy: ddp, zero1, zero2, zero3 for 0 to 3",
}  # fmt: skip

_OFF = ("", "none", "null", "no")


def says_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` switches a refused ``name`` off, as the files of other tools often do."""
    plain = str(value).strip().lower() if _plain(value) else value
    return value in (None, False, [], {}) or switch(value) is False or plain in _OFF or (name in AXES and plain == "1")


def rename(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Our leaf and value for a name and value in anybody's spelling; unknown names come back as they are.

    Empty: a switch that asks for what is done anyway. Two: a word that says two things. Raises Refusal for a switch's
    value that is not in its table.
    """
    word = name.replace("-", "_")
    if word in SWITCHES:
        return _switched(word, value)
    if word == "template" and isinstance(value, str) and (value == "chatml" or not re.fullmatch(r"[\w-]+", value)):
        return (("chat_template", value),)  # a file; a bare word is the name of a template in another tool's list
    leaf = ALIASES.get(word, word)
    if leaf == "warmup_steps" and (share := _share(value)) is not None:
        return (("warmup_ratio", share),)
    if leaf == "tuner_type" and value == "qlora":
        return (leaf, "lora"), ("quant_bits", 4)
    if leaf == "quant_bits" and says_nothing(leaf, value):
        return ((leaf, None),)
    if leaf == "quant_bits" and str(value) in ("1", "2", "3", "5", "6", "8"):
        raise refuse(f"{word}: not in this release", value=value, choices=("4",), hint=QUANTISED)
    return ((leaf, translate(leaf, value)),)


def denied(name: str, value: Any) -> tuple[str, Any] | None:
    """Our leaf and the value that a switch which is off says it has not."""
    word = name.replace("-", "_")
    return DENIES.get(word) if switch(value) is False else None


def _switched(word: str, value: Any) -> tuple[tuple[str, Any], ...]:
    table = SWITCHES[word]
    if value is None:
        return ()
    key = switch(value) if True in table or False in table else value
    if not _plain(key) or key not in table:
        said = tuple(dict.fromkeys(str(choice).lower() for choice in table))
        raise refuse(f"{word}: no such value in this release", value=value, choices=said,
                     hint=ALTERNATIVES.get(word, ""))  # fmt: skip
    ours = table[key]
    return (ours,) if ours else ()


def switch(value: Any) -> Any:
    """``"True"`` is true, ``"off"`` is false; anything else comes back as it is."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return words.get(str(value).lower(), value) if _plain(value) else value


def _share(value: Any) -> float | None:
    """A number between 0 and 1: Hugging Face's warmup_steps takes a share of the steps too."""
    try:
        number = float(value) if isinstance(value, (str, float)) else 0.0
    except ValueError:
        return None
    return number if 0 < number < 1 else None


def translate(leaf: str, value: Any) -> Any:
    """``value`` in our spelling. Raises Refusal for a dataset's map that is not understood."""
    if leaf in ("dataset", "val_dataset"):
        return dataset_words(value)
    table = VALUES.get(leaf, {})
    if isinstance(value, (list, tuple)):
        return [table.get(item, item) if _plain(item) else item for item in value]
    said = switch(value) if True in table else value
    return table.get(said, value) if _plain(said) else value


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int))
