"""What is measured: cases, ours and theirs, as rows. A new contestant of ours is a line in OURS."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.made import MEAN_DOCUMENT
from benchmarks.numbers import Work, span
from benchmarks.shapes import SHAPES
from hpcft.plan.shape import Shape, shape_of

# A contestant of ours: words that are added to the run, and the share of the roofline that is expected, for schedules.
OURS: dict[str, tuple[str, float]] = {
    "us": ("--gradient_checkpointing none", 0.8),
    "us-defaults": ("", 0.7),
    "us-eager": ("--gradient_checkpointing none --torch_compile false", 0.6),
    "us-fsdp": ("--gradient_checkpointing none --strategy fsdp --tp 1", 0.7),
    "us-full-recompute": ("--gradient_checkpointing full", 0.5),
    "us-fp8": ("--gradient_checkpointing none --base_precision fp8", 0.9),
    "us-bf16": ("--gradient_checkpointing none --main_params_dtype bfloat16", 0.9),
    "us-dropout": ("--gradient_checkpointing none --lora_dropout 0.05", 0.75),
}
LIKE_THEM = {"trl-varlen-bf16": "us-bf16"}  # a peer of another precision → the row of ours that has it
OTHER_NUMBERS = ("us-fp8", "us-bf16", "us-dropout", "trl-varlen-bf16")  # these compute other numbers than the row says
FULL = "--tuner_type full --learning_rate 1e-5"
LORA = "--tuner_type lora --lora_dropout 0 --learning_rate 1e-4"
BOTH, ALL = ("us", "us-eager"), ("us", "us-eager", "us-fp8", "us-dropout")


@dataclass(frozen=True)
class Case:
    """One line of work. length: tokens of a window; documents: in each; windows: per GPU and optimizer step.

    ours, peers: who runs it, in this order; the first of ours is what losses are compared with. gpus: each of these
    numbers of GPUs is a row of its own.
    """

    model: str
    words: str
    length: int
    documents: int
    windows: int
    peers: tuple[str, ...]
    ours: tuple[str, ...] = ("us",)
    gpus: tuple[int, ...] = (1,)
    rank: int = 0
    spread: str = "ddp"  # how peers spread the model: ddp, fsdp, zero3
    quantised: bool = False
    pairs: bool = False
    shards: bool = False  # are optimizer states shared by the GPUs?
    tp: int = 1

    @property
    def shape(self) -> Shape:
        """Of the model."""
        shape = shape_of(SHAPES[self.model])
        assert shape is not None
        return shape

    @property
    def vocabulary(self) -> int:
        return self.shape.vocabulary

    def global_windows(self, gpus: int) -> int:
        """Of an optimizer step."""
        return self.windows * (gpus // self.tp)

    def work(self, gpus: int, lengths: list[int], trained: float) -> Work:
        """What is done to one token; lengths: of the documents of some windows."""
        return Work(
            shape=self.shape, span=span(lengths), rank=self.rank, quantised=self.quantised, reference=self.pairs,
            trained=trained, tokens=self.windows * self.length // self.tp, micro=min(self.windows * self.length, 8192),
            shards=gpus if self.shards or self.tp > 1 else 1,
        )  # fmt: skip


# 36 documents of a mean of 228 tokens in a window of 8192: close to the mean of real records, and two windows of them
# are whole batches of eight, which is what a peer's defaults take.
SHORT = {"length": 8192, "documents": 36}
assert abs(SHORT["length"] / SHORT["documents"] / MEAN_DOCUMENT - 1) < 0.05
SFT_PEERS = ("trl-varlen", "trl-tuned", "trl", "hf")

CASES: dict[str, Case] = {
    "7b-lora-short": Case("qwen-7b", f"{LORA} --lora_rank 8", windows=2, rank=8, peers=SFT_PEERS, ours=ALL, **SHORT),
    "1.5b-full-short": Case(
        "qwen-1.5b", FULL, windows=2, peers=("trl-varlen", "trl-varlen-bf16", "trl-tuned", "trl", "hf"),
        ours=(*BOTH, "us-bf16"), **SHORT,
    ),
    "8b-lora-4096": Case("llama-8b", f"{LORA} --lora_rank 16", 4096, 1, 4, SFT_PEERS, ALL, rank=16),
    "2b-full-short": Case("qwen-2b", FULL, windows=2, peers=(), **SHORT),  # for benchmarks.stall
    "0.5b-full-2048": Case("qwen-0.5b", FULL, 2048, 1, 8, SFT_PEERS, BOTH),
    "8b-qlora": Case(
        "llama-8b", f"{LORA} --lora_rank 16 --quant_bits 4", 4096, 1, 4, ("trl-varlen", "trl"), rank=16, quantised=True
    ),
    "8b-full-fsdp-4096": Case(
        "llama-8b", f"{FULL} --strategy fsdp", 4096, 1, 2, ("trl-varlen", "trl", "hf", "hf-zero3"), BOTH, (4,),
        spread="fsdp", shards=True,
    ),
    "1.5b-full-fsdp-4096": Case(
        "qwen-1.5b", f"{FULL} --strategy fsdp", 4096, 1, 4, ("trl-varlen", "hf-zero3"), BOTH, (2,),
        spread="fsdp", shards=True,
    ),
    "7b-lora-ddp-scaling": Case(
        "qwen-7b", f"{LORA} --lora_rank 8 --strategy ddp", windows=2, rank=8, peers=("trl-varlen",), gpus=(1, 4),
        **SHORT,
    ),
    "8b-full-tp4": Case(
        "llama-8b", f"{FULL} --strategy ddp --tp 4", 4096, 1, 8, (), ours=("us", "us-fsdp"), gpus=(4,), tp=4,
    ),
    "1.5b-full-tp2": Case(
        "qwen-1.5b", f"{FULL} --strategy ddp --tp 2", 4096, 1, 8, (), ours=("us", "us-fsdp"), gpus=(2,), tp=2,
    ),
    # 16 pairs a window: a peer's batches of eight pairs come out even again.
    "dpo-7b-lora": Case(
        "qwen-7b", f"{LORA} --lora_rank 8 --task dpo", 8192, 32, 2, ("trl-dpo", "trl-dpo-defaults"), rank=8, pairs=True,
    ),
}  # fmt: skip
TINY = {"model": "tiny", "length": 256, "documents": 8, "windows": 2}
REHEARSAL: dict[str, Case] = {
    "tiny": Case(words=f"{LORA} --lora_rank 8", rank=8, peers=SFT_PEERS, ours=("us", "us-defaults"), **TINY),
    "tiny-full": Case(
        words=FULL, peers=("trl-varlen-bf16", "trl-varlen", "hf"), ours=("us", "us-bf16"), **TINY
    ),
    "tiny-full-fsdp": Case(
        words=f"{FULL} --strategy fsdp", peers=("trl-varlen", "hf", "hf-zero3"), gpus=(2,), spread="fsdp", shards=True,
        **TINY,
    ),
    "tiny-lora-ddp": Case(words=f"{LORA} --strategy ddp", rank=8, peers=("trl-varlen",), gpus=(1, 2), **TINY),
    "tiny-full-tp2": Case(
        words=f"{FULL} --strategy ddp --tp 2", peers=(), ours=("us", "us-fsdp"), gpus=(2,), tp=2, **TINY
    ),
    "tiny-qlora": Case(words=f"{LORA} --quant_bits 4", rank=8, peers=("trl",), quantised=True, **TINY),
    "tiny-dpo": Case(
        words=f"{LORA} --task dpo", rank=8, peers=("trl-dpo", "trl-dpo-defaults"), pairs=True, **TINY
    ),
}  # fmt: skip
EVERY = {**CASES, **REHEARSAL}


def merged(*texts: str) -> list[str]:
    """The words of several texts as one command line: of a key that is said twice the later value holds."""
    said: dict[str, list[str]] = {}
    for word in " ".join(texts).split():
        if word.startswith("--"):
            key = word
            said[key] = []
        else:
            said[key].append(word)
    return [part for key, values in said.items() for part in (key, *values)]
