"""One whole, valid, tiny Plan for CPU, and the means to change it section by section."""

from __future__ import annotations

import dataclasses
from typing import Any

from hpcft.plan.layout import Axis, Layout
from hpcft.plan.plan import (
    SCHEMA,
    BatchPlan,
    Budgets,
    CheckpointPlan,
    DataPlan,
    Folders,
    ModelPlan,
    ObjectivePlan,
    OptimPlan,
    Plan,
    Resources,
    Source,
    TrainPlan,
    TunerPlan,
    Variable,
)


def plan(**changes: Any) -> Plan:
    """The tiny Plan with ``changes``: ``plan(optim={"max_steps": 8}, name="x", layout=layout(2, 2))``.

    A dictionary replaces fields of a section, anything else replaces the section.
    """
    whole = _tiny()
    for name, change in changes.items():
        section = dataclasses.replace(getattr(whole, name), **change) if isinstance(change, dict) else change
        whole = dataclasses.replace(whole, **{name: section})
    return whole


def layout(nodes: int, ranks_per_node: int, **degrees: int) -> Layout:
    """Data parallel over all ranks unless ``degrees`` names other axes, outermost first."""
    degrees = degrees or {"dp": nodes * ranks_per_node}
    return Layout(nodes, ranks_per_node, tuple(Axis(name, degree) for name, degree in degrees.items()))


def _tiny() -> Plan:
    return Plan(
        schema=SCHEMA,
        hpcft="0",
        name="tiny",
        model=ModelPlan(
            path="model",
            source="local",
            revision=None,
            from_scratch=True,
            dtype="float32",
            attention="sdpa",
            trust_remote_code=False,
            quantization="none",
            main_params_dtype="float32",
        ),
        tuner=TunerPlan(
            kind="full",
            rank=8,
            alpha=32.0,
            dropout=0.0,
            target_modules=("all-linear",),
            modules_to_save=(),
            bias="none",
            use_rslora=False,
            use_dora=False,
            init_lora_weights="true",
        ),
        data=DataPlan(
            train=(Source(path="train.jsonl"),),
            validation=(),
            validation_ratio=0.0,
            tokenizer="model",
            tokenizer_source="local",
            tokenizer_revision=None,
            trust_remote_code=False,
            chat_template=None,
            system=None,
            model_name=None,
            model_author=None,
            train_on="assistant",
            max_length=64,
            truncation="drop",
            packing=True,
            seed=7,
            max_untrained_rows=0.5,
            rows="chat",
            num_labels=0,
            workers=1,
        ),
        batch=BatchPlan(global_windows=4, micro_windows=2, accumulation=2, eval_windows=2),
        optim=OptimPlan(
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            warmup_ratio=0.0,
            min_lr_ratio=0.0,
            decay_ratio=0.1,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            max_grad_norm=1.0,
            num_train_epochs=1.0,
            max_steps=4,
        ),
        train=TrainPlan(
            objective="sft",
            objective_module="hpcft.train.objectives.sft",
            strategy="ddp",
            strategy_module="hpcft.train.strategies.ddp",
            deepspeed="",
            seed=7,
            deterministic=True,
            recomputation="none",
            compiled=False,
            resharding=True,
            loss_chunk=0,
            nonfinite="stop",
            logging_steps=1,
            eval_steps=0,
            early_stopping_patience=0,
            dataloader_workers=0,
            collective_timeout=120,
        ),
        objective=ObjectivePlan(
            beta=0.0,
            loss_type="none",
            label_smoothing=0.0,
            rpo_alpha=0.0,
            desirable_weight=1.0,
            undesirable_weight=1.0,
            simpo_gamma=0.0,
            cpo_alpha=0.0,
            center_rewards_coefficient=0.0,
            reference="none",
            labels=(),
        ),
        checkpoint=CheckpointPlan(save_steps=2, keep=2, load_best_at_end=False, resume="auto"),
        layout=layout(1, 1),
        memory=None,
        resources=Resources(
            cluster="loopback",
            scheduler="slurm",
            job_name="tiny",
            partition=None,
            account=None,
            qos=None,
            constraint=None,
            reservation=None,
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=1,
            gpus_per_node=0,
            gpu_type=None,
            gpu_request="none",
            memory=None,
            exclusive=False,
            time_minutes=10,
            signal_lead=60,
            requeue=True,
            preemption="requeue",
            extra=(),
            setup=(),
            launcher="srun",
            accelerator="cpu",
            backend="gloo",
            prepare="login",
            template=None,
            prepare_job=None,
        ),
        budgets=Budgets(failures=3, time_limits=10, without_progress=3),
        environment=(Variable(name="OMP_NUM_THREADS", value="1", reason="one thread per rank: the ranks share cores"),),
        folders=Folders(runs="runs", store="prepared"),
    )
