"""Words of other tools for what is no leaf here: set aside with the reason, or refused with what to use instead."""

from __future__ import annotations

# name → why it has no effect here; it is accepted, and the sentence is printed once
SET_ASIDE: dict[str, str] = {
    "node_rank": "Slurm gives every rank its place",
    "master_addr": "the first node of the allocation is the meeting point",
    "master_port": "the port follows from the job",
    "overwrite_output_dir": "a run folder is never overwritten; give the run another name",
    **dict.fromkeys(
        (
            "report_to",
            "plot_loss",
            "logging_dir",
            "wandb_project",
            "wandb_entity",
            "wandb_name",
            "wandb_log_model",
            "wandb_watch",
            "wandb_mode",
            "wandb_run_id",
        ),
        "metrics.jsonl and TensorBoard's files are always written, into the run folder",
    ),
    **dict.fromkeys(("eval_table_size", "eval_max_new_tokens"), "evaluation is the loss; nothing is generated"),
    "local_rank": "Slurm or torchrun tells every rank which one it is",
    "debug": "every rank has a log of its own: hpcft logs",
    "lora_fan_in_fan_out": "peft finds out which way a layer's weights lie",
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"),
        "nonfinite: stop ends a run whose loss is not finite; early_stopping_patience one that gets no better",
    ),
    "auto_find_batch_size": "per_device_train_batch_size: auto follows from the memory",
    "agent_template": "the tokenizer's own chat template is used, also for tools",
    "template": "the tokenizer's own chat template is used; chat_template: FILE.jinja is another",
    **dict.fromkeys(("model_type", "tokenizer_type", "tokenizer_use_fast"), "the model's own folder says it"),
    **dict.fromkeys(
        ("padding_free", "batch_flattening", "pad_to_sequence_len", "group_by_length", "train_sampling_strategy"),
        "packing: true fills the windows; padding never counts in the loss",
    ),
    **dict.fromkeys(
        ("eval_packing", "eval_sample_packing", "packing_strategy"), "packing is for training and evaluation alike"
    ),
    **dict.fromkeys(
        ("freeze_vit", "freeze_aligner", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_mm_modules"),
        "a text model has no such part",
    ),
    **dict.fromkeys(
        (
            "use_liger_kernel",
            "enable_liger_kernel",
            "tf32",
            "gradient_checkpointing_kwargs",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "low_cpu_mem_usage",
            "ddp_find_unused_parameters",
            "ddp_backend",
            "device_map",
            "remove_unused_columns",
        ),
        "how the trainer gets its speed is its own business; the losses are the same",
    ),
    **dict.fromkeys(
        ("logging_first_step", "include_num_input_tokens_seen", "log_level", "disable_tqdm"),
        "the log has it, every logging_steps",
    ),
    **dict.fromkeys(
        ("chunked_cross_entropy", "chunked_cross_entropy_num_chunks", "cut_cross_entropy", "num_output_chunks"),
        "logits are always gone through chunk by chunk; loss_chunk says how many tokens at a time",
    ),
    "use_cache": "training never uses the cache",
    "bnb_4bit_quant_storage": "the strategy decides how the quantised base is stored",
    **dict.fromkeys(
        ("lazy_tokenize", "overwrite_cache", "load_from_cache_file", "dataset_prepared_path"),
        "data is prepared before the job and found by its content",
    ),
    **dict.fromkeys(("do_train", "do_eval"), "submit trains, and evaluates where there is something to evaluate on"),
    "add_version": "a run is known by its name",
    "save_safetensors": "nothing else is written",
    "average_tokens_across_devices": "the loss is always the mean over all trained tokens",
}

_AXIS = "this release spreads data, weights (strategy: fsdp, zero3) and tensors (tp)"
_WINDOW = "this release keeps a window on one rank: a smaller max_length, or truncation_strategy"
QUANTISED = "quant_bits: 4 or base_precision: fp8, with LoRA, on the unquantised base model"
_SHARDED = "strategy: fsdp shards over all the ranks that tp and dp_replicate leave"
_REFERENCE = "the reference is the model as it was before training: leave it out, or reference: precompute"

# The degrees of axes: 1 of them is no axis at all.
AXES: dict[str, str] = {
    **dict.fromkeys(
        ("pp", "pp_size", "pipeline_parallel_size", "pipeline_model_parallel_size", "pipeline_parallel_degree",
         "ep", "ep_size", "expert_model_parallel_size", "expert_parallel_degree"),
        _AXIS,
    ),
    **dict.fromkeys(
        ("cp", "cp_size", "context_parallel_size", "sequence_parallel_size", "context_parallel_degree"), _WINDOW
    ),
    **dict.fromkeys(("dp_shard", "dp_shard_size", "mp_shard_size"), _SHARDED),
}  # fmt: skip

# name → what to use instead; refused, unless it is switched off (null, false, none; 1 for an axis)
REFUSED: dict[str, str] = {
    **AXES,
    **dict.fromkeys(("quantization", "quantization_config", "load_in_8bit", "gptq", "awq"), QUANTISED),
    "activation_offloading": "gradient_checkpointing: full saves the most memory in this release",
    **dict.fromkeys(("ref_model", "ref_model_type", "ref_adapters", "ref_model_adapters"), _REFERENCE),
    "reference_free": "task: cpo or simpo need no reference",
    "reward_model": "task: rm trains one; to learn from preferences without one: task: dpo",
    "reward_funcs": "this release has no online reinforcement learning; task: sft",
    **dict.fromkeys(("adapters", "adapter_name_or_path", "lora_model_dir"),
                    "adapters start anew; to go on with a run: hpcft resume"),
    **dict.fromkeys(
        ("images", "freeze_llm", "freeze_language_model", "max_pixels", "min_pixels", "image_max_pixels",
         "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen", "image_folder",
         "image_dir", "media_dir", "image_size", "image_resolution", "image_resize_algorithm", "vision_tower",
         "is_multimodal", "processor_type", "vit_lr", "aligner_lr", "vit_gradient_checkpointing"),
        "this release trains text models, on text: leave it out",
    ),
    "streaming": "data is prepared on disk and read in place; `path#N` takes a part of it",
    "max_samples": "write the number behind each dataset: path#1000",
    "dataset_dir": "name the files themselves: dataset: [data/alpaca_en_demo.json]",
    "special_tokens": "save them with the tokenizer, into the model's folder",
    "plugins": "nothing is loaded by import path",
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), "say it in optimizer steps: eval_steps, save_steps"),
    **dict.fromkeys(("save_only_model", "resume_only_model"),
                    "checkpoints are whole, so that a run resumes exactly; hpcft export writes the model alone"),
    "push_to_hub": "export writes a folder; upload it with: hf upload NAME FOLDER",
}  # fmt: skip
