"""The keys of a DeepSpeed file, as rows: what is kept beside ours, what gives way, what has no effect, what is refused.

Precision, optimizer, schedule, batch, clipping, checkpoints and monitors are the run's own, so that a loss is the same
on every strategy; what only moves bytes (buckets, overlap, thresholds) and what only measures is kept.
"""

from __future__ import annotations

# key of zero_optimization → its kind
ZERO_KEPT: dict[str, type] = {
    **dict.fromkeys(
        ("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "round_robin_gradients",
         "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "memory_efficient_linear",
         "log_trace_cache_warnings", "enable_sanity_checks", "stage3_use_all_reduce_for_fetch_params"),
        bool,
    ),
    **dict.fromkeys(
        ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
         "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
         "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
        int,
    ),
}  # fmt: skip
OFFLOAD_KEPT: dict[str, type] = {"pin_memory": bool}
OFFLOAD_IDLE = dict.fromkeys(
    ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "pipeline_read", "pipeline_write",
     "pipeline", "ratio", "super_offload"),
    "of use on NVMe only",
)  # fmt: skip
TOP_KEPT: dict[str, type] = {
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), bool),
    **dict.fromkeys(("comms_logger", "flops_profiler"), dict),
}
KINDS = {bool: "true or false", int: "a whole number of at least 0", dict: "a map of keys and values"}

# Where it is in the file → the key of the run that it gives way to.
GIVES_WAY: dict[tuple[str, ...], str] = {
    ("train_micro_batch_size_per_gpu",): "per_device_train_batch_size",
    ("gradient_accumulation_steps",): "gradient_accumulation_steps",
    ("train_batch_size",): "global_batch_size",
    ("gradient_clipping",): "max_grad_norm",
    ("steps_per_print",): "logging_steps",
    ("fp16",): "torch_dtype",
    ("bf16",): "torch_dtype",
    ("bfloat16",): "torch_dtype",
    ("amp",): "torch_dtype",
    ("torch_autocast",): "torch_dtype",
    ("data_types",): "torch_dtype",
    ("activation_checkpointing",): "gradient_checkpointing",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
    ("optimizer", "params", "eps"): "adam_epsilon",
    ("scheduler", "type"): "lr_scheduler_type",
    ("scheduler", "params", "warmup_num_steps"): "warmup_steps",
    ("scheduler", "params", "warmup_max_lr"): "learning_rate",
    ("scheduler", "params", "total_num_steps"): "max_steps",
}
_CHECKPOINTS, _SUMS = "checkpoints are hpcft's own", "gradients are summed in float32, as on every strategy"
_METRICS = "metrics.jsonl and TensorBoard's files are always written, into the run folder"
OPTIMIZER = "the optimizer is AdamW with float32 masters and moments"
_ONE_LOSS = "leave it out: the loss is the same on every strategy"
TOP_SET_ASIDE: dict[str, str] = {
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), OPTIMIZER),
    **dict.fromkeys(
        ("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
         "seq_parallel_communication_data_type"), _SUMS,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _METRICS),
    **dict.fromkeys(("checkpoint", "load_universal", "use_node_local_storage", "nebula"), _CHECKPOINTS),
    "aio": "nothing is offloaded to disk",
    "dataloader_drop_last": "every row counts",
    **dict.fromkeys(("disable_allgather", "compile", "timers", "graph_harvesting"), "the trainer sees to its speed"),
}  # fmt: skip
ZERO_SET_ASIDE: dict[str, str] = {
    **dict.fromkeys(
        ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
         "load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint"), _CHECKPOINTS,
    ),
    **dict.fromkeys(("legacy_stage1", "override_module_apply", "cpu_offload_use_pin_memory"), "it is out of use"),
}  # fmt: skip
_HSDP = "strategy: fsdp with dp_replicate: N keeps a sharded copy in each group of ranks"
TOP_REFUSED: dict[str, str] = {
    **dict.fromkeys(("tensor_parallel", "autotp_size"), "strategy: ddp or fsdp with tp: N"),
    "autotuning": "leave it out: per_device_train_batch_size: auto",
    "elasticity": "leave it out: a run resumes on any number of nodes",
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "data_sampling"), "data goes in the order of `seed`"),
    **dict.fromkeys(("compression_training", "quantize_training", "weight_quantization"), "quant_bits: 4 with LoRA"),
    **dict.fromkeys(("progressive_layer_drop", "eigenvalue"), "leave it out: every layer is trained"),
    "sparse_attention": "attn_impl chooses the kernel",
    "hybrid_engine": "this release has no online reinforcement learning; task: sft",
    "pipeline": "strategy: zero3, or fsdp with tp",
    "sequence_parallel_size": "a smaller max_length, or truncation_strategy",
}
ZERO_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
         "zeropp_loco_param"), _ONE_LOSS,
    ),
    **dict.fromkeys(("zero_hpz_partition_size", "mics_shard_size", "mics_hierarchical_params_gather"), _HSDP),
}  # fmt: skip
OLD_NAMES = {
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
}
OFFLOADS = {"offload_optimizer": "optimizer", "offload_param": "weights"}
LEGACY_OFFLOADS = {"cpu_offload": "optimizer", "cpu_offload_param": "weights", "cpu_offload_params": "weights"}
