"""What the tests of config, plan and cli share: command lines in, runs, Plans and complaints out."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hpcft.config.cluster import ClusterProfile
from hpcft.config.load import Loaded, load_cluster, load_run
from hpcft.errors import Problem, Refusal
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
PROFILES = sorted(path.stem for path in (ROOT / "templates" / "clusters").glob("*.yaml"))
STARTERS = sorted(path.stem for path in (ROOT / "templates" / "runs").glob("*.yaml"))
LEAST = "--model m --dataset a.jsonl"

# The seeds' own command line for two GPUs, word for word.
SEED = """
--model Qwen/Qwen2.5-7B-Instruct --train_type lora
--dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' 'AI-ModelScope/alpaca-gpt4-data-en#500' 'swift/self-cognition#500'
--torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 8
--eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output
--system 'You are a helpful assistant.' --warmup_ratio 0.05 --dataloader_num_workers 4 --model_author swift
--model_name swift-robot --nproc_per_node 2 --cluster infiniband-h100
"""


def run(line: str = "") -> Loaded:
    """The run of a command line, as a shell would split it; the least a run needs is added."""
    return load_run(shlex.split(f"{LEAST} {line}"))


def plan(line: str = "", cluster: str = "infiniband-h100") -> Plan:
    """Its Plan for a profile that hpcft brings."""
    loaded = run(line)
    return make_plan(loaded.run, profile(cluster), loaded.origins)


def profile(name: str) -> ClusterProfile:
    """A profile that hpcft brings."""
    return load_cluster(str(ROOT / "templates" / "clusters" / f"{name}.yaml"))[0]


def starter(name: str) -> Path:
    """A run that hpcft brings."""
    return ROOT / "templates" / "runs" / f"{name}.yaml"


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    """A file with ``text`` (its lines begin at line 1), as the word that names it."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaints(*words: str) -> tuple[Problem, ...]:
    """Every complaint about a command line. Fails where there is none."""
    with pytest.raises(Refusal) as caught:
        load_run(words)
    return caught.value.problems


def plan_complaints(line: str, cluster: str = "infiniband-h100") -> tuple[Problem, ...]:
    """Every complaint about a run on a profile."""
    with pytest.raises(Refusal) as caught:
        plan(line, cluster)
    return caught.value.problems
