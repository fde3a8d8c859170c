"""Other trainers on the same data, order, model, adapters and optimizer: python -m benchmarks.peers TASK.json

A peer is a function that builds a ``transformers.Trainer`` and a row in PEERS. All read the numbers of our Plan, so
that only what the row says differs. Each prints its settings into its log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.rows import documents, padded, pairs, windows
from benchmarks.stopwatch import Stopwatch
from benchmarks.task import Task, read_task

BETA = 0.1  # of dpo, on both sides


@dataclass(frozen=True)
class Peer:
    """needs: packages. packed: a row of a batch is a window, else a document (dpo: a pair). fill: try the largest
    batch first; else ``rows`` a forward pass, and fewer where those do not fit. expect: share of the roofline.
    """

    about: str
    needs: tuple[str, ...]
    build: Callable[[Task], Any]
    packed: bool = False
    fill: bool = False
    rows: int = 8
    expect: float = 0.3


def batches(task: Task, peer: Peer) -> list[int]:
    """Rows of a forward pass to try, the largest first; each divides a GPU's share of an optimizer step."""
    case = task.row
    share = case.windows
    if not peer.packed:
        share = case.windows * case.documents // (2 if case.pairs else 1)
    most = share if peer.fill else min(peer.rows, share)
    dividing = [rows for rows in range(most, 0, -1) if share % rows == 0]
    if peer.fill:
        return dividing
    return dividing[:1] + ([1] if dividing[0] > 1 else [])


def settings(task: Task, **own: Any) -> dict[str, Any]:
    """Arguments of a Trainer that follow from our Plan, and ``own``."""
    plan, case = task.plan(), task.row
    optim = plan.optim
    per_row = case.documents // (2 if case.pairs else 1) if not PEERS[task.contestant].packed else 1
    given = {
        "output_dir": str(task.place / "out"), "max_steps": task.optimizer_steps,
        "per_device_train_batch_size": task.batch, "gradient_accumulation_steps": case.windows * per_row // task.batch,
        "learning_rate": optim.learning_rate, "lr_scheduler_type": "constant", "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1, "adam_beta2": optim.beta2, "adam_epsilon": optim.epsilon,
        "max_grad_norm": optim.max_grad_norm, "optim": "adamw_torch_fused", "seed": plan.train.seed,
        "bf16": not task.cpu, "use_cpu": task.cpu, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "dataloader_num_workers": 0 if task.cpu else 2, "ddp_find_unused_parameters": False,
        **({"ddp_backend": "gloo"} if task.cpu and task.gpus > 1 else {}), **spread(task), **own,
    }  # fmt: skip
    task.say(f"{task.contestant}: {given}")
    return given


def spread(task: Task) -> dict[str, Any]:
    """How the case spreads the model over GPUs, in the Trainer's words."""
    if task.gpus == 1 or task.row.spread == "ddp":
        return {}
    if task.contestant.endswith("zero3"):
        zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}  # fmt: skip
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto")}}
    layer = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer"}[load_config(task).model_type]
    config = {"version": 2, "transformer_layer_cls_to_wrap": [layer], "reshard_after_forward": True}
    return {"fsdp": True, "fsdp_config": {**config, "cpu_ram_efficient_loading": True}}


def load_config(task: Task) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(task.plan().model.path)


def model(task: Task, attention: str = "sdpa", masters: str = "float32") -> Any:
    """From the same files as ours. What is trained whole is float32, as our masters are; a frozen base bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plan, case = task.plan(), task.row
    half = torch.float32 if task.cpu else torch.bfloat16
    dtype = half if case.rank or masters == "bfloat16" else torch.float32
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if case.quantised:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
        )
    if not task.cpu and not spread(task):
        given["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    made = AutoModelForCausalLM.from_pretrained(plan.model.path, **given)
    made.config.use_cache = False
    return made


def adapters(task: Task) -> Any:
    """peft's settings of the case; None for full tuning."""
    from peft import LoraConfig

    tuner = task.plan().tuner
    if not task.row.rank:
        return None
    return LoraConfig(task_type="CAUSAL_LM", r=tuner.rank, lora_alpha=tuner.alpha, lora_dropout=tuner.dropout,
                      target_modules="all-linear")  # fmt: skip


def start_as_ours(task: Task, trainer: Any) -> None:
    """Adapters begin with the numbers that ours begin with, so that gradients can be compared from the first step."""
    if not task.row.rank:
        return
    import torch

    from hpcft.train.adapters import add_adapters
    from hpcft.train.model import empty_model, load_config

    plan = task.plan()
    ghost = add_adapters(empty_model(plan, load_config(plan.model), "sdpa"), plan.tuner, plan.train.seed)
    numbers = {name: p for name, p in ghost.named_parameters() if "lora_" in name}
    mine = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if numbers.keys() != mine.keys():
        raise RuntimeError(f"adapters differ: {sorted(numbers.keys() ^ mine.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(numbers[name])


def tokenizer(task: Task) -> Any:
    """TRL asks for one; the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip


def varlen(task: Task) -> str:
    """Our kernel, made known to transformers, which gives it the ends of documents that TRL's collator finds.

    On a CPU sdpa stands in for it.
    """
    import torch

    from hpcft.train.attention import VARLEN, choose_attention

    if task.cpu:
        return "sdpa"
    name = choose_attention("auto", load_config(task), torch.bfloat16, torch.device("cuda"))
    if not name.startswith(VARLEN):
        raise RuntimeError(f"our kernel does not run here: attention would be {name}")
    return name


def hf(task: Task) -> Any:
    """transformers.Trainer: batches of 8 padded documents, sdpa, nothing recomputed."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**settings(task, train_sampling_strategy="sequential", remove_unused_columns=False))
    made, lora = model(task), adapters(task)
    if lora:
        made = get_peft_model(made, lora)
    return Trainer(made, arguments, data_collator=padded, train_dataset=documents(task))


def trl(task: Task) -> Any:
    """SFTTrainer as it comes: 8 padded documents, gradient checkpointing, its chunked loss."""
    return sft(task, documents(task), "sdpa")


def trl_tuned(task: Task) -> Any:
    """Packed windows, Liger's kernels, nothing recomputed, sdpa."""
    return sft(task, windows(task), "sdpa", packing=True, gradient_checkpointing=False, **liger(task))


def trl_varlen(task: Task) -> Any:
    """The same with our attention kernel registered for it and the card filled."""
    return sft(task, windows(task), varlen(task), packing=True, gradient_checkpointing=False, **liger(task))


def trl_varlen_bf16(task: Task) -> Any:
    """The same with weights and moments in bfloat16: leaner and faster, and another training."""
    own = {"packing": True, "gradient_checkpointing": False, **liger(task)}
    return sft(task, windows(task), varlen(task), "bfloat16", **own)


def liger(task: Task) -> dict[str, Any]:
    """Its kernels are Triton's: on a CPU none run."""
    return {} if task.cpu else {"use_liger_kernel": True}


def sft(task: Task, rows: list[dict[str, Any]], attention: str, masters: str = "float32", **own: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    lengths = {"max_length": task.row.length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = SFTConfig(**settings(task, train_sampling_strategy="sequential", **lengths, **own))
    data = Dataset.from_list(rows)
    return SFTTrainer(model(task, attention, masters), arguments, train_dataset=data,
                      processing_class=tokenizer(task), peft_config=adapters(task))  # fmt: skip


def trl_dpo(task: Task) -> Any:
    """DPOTrainer at its best: it pads (1.16 has switched padding-free off), Liger's kernels, nothing recomputed."""
    return dpo(task, gradient_checkpointing=False, **liger(task))


def trl_dpo_defaults(task: Task) -> Any:
    """DPOTrainer as it comes."""
    return dpo(task)


def dpo(task: Task, **own: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *ignored: Any) -> Any:
            return dataset

    given = {"train_sampling_strategy": "sequential", "max_length": None, "beta": BETA, **own}
    arguments = DPOConfig(**settings(task, **given))
    return Tokenised(model(task), args=arguments, train_dataset=Dataset.from_list(pairs(task)),
                     processing_class=tokenizer(task), peft_config=adapters(task))  # fmt: skip


TRL = ("trl", "datasets")
PEERS: dict[str, Peer] = {
    "hf": Peer("HF Trainer, defaults", (), hf, expect=0.15),
    "hf-zero3": Peer("HF Trainer, DeepSpeed ZeRO-3", ("deepspeed",), hf, fill=True, expect=0.5),
    "trl": Peer("TRL, defaults", TRL, trl, expect=0.12),
    "trl-tuned": Peer("TRL, packing, Liger, sdpa", TRL, trl_tuned, packed=True, rows=1, expect=0.45),
    "trl-varlen": Peer("TRL, packing, Liger, our kernel, card filled", TRL, trl_varlen, packed=True, fill=True,
                       expect=0.65),
    "trl-varlen-bf16": Peer("the same, bf16 weights and moments", TRL, trl_varlen_bf16, packed=True, fill=True,
                            expect=0.8),
    # Four pairs at a time, and more, run out of memory on 80 GB; finding that out takes as long as the measurement.
    "trl-dpo": Peer("TRL DPO, padded, Liger, card filled", TRL, trl_dpo, rows=2, expect=0.15),
    "trl-dpo-defaults": Peer("TRL DPO, defaults", TRL, trl_dpo_defaults, expect=0.12),
}  # fmt: skip


def missing(peer: Peer) -> str:
    """Why it cannot run here; "" when it can."""
    return ", ".join(f"{name} is not installed" for name in peer.needs if find_spec(name) is None)


def run(task: Task) -> None:
    """Train until the stopwatch has enough; rank 0 writes what came of it."""
    from transformers import TrainerCallback

    from benchmarks.numbers import COMPARED

    first = os.environ.get("RANK", "0") == "0"
    watch = Stopwatch(task.limits, "cpu" if task.cpu else "cuda", first)
    losses: list[float] = []
    norms: list[float] = []

    class Watched(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
            # Only the first steps are logged: reading a loss waits for the device.
            control.should_log = state.global_step <= COMPARED
            control.should_training_stop = watch.ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **ignored: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                norms.append(float(logs.get("grad_norm", "nan")))

    trainer = PEERS[task.contestant].build(task)
    start_as_ours(task, trainer)
    trainer.add_callback(Watched())
    trainer.train()
    facts = {"losses": losses, "norms": norms, "micro": task.batch, **watch.facts()}
    if first:
        task.result(facts)


if __name__ == "__main__":
    run(read_task(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
