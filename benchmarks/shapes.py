"""Models of real shapes with random weights: written once, read by whoever is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "qwen-7b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    "qwen-1.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "qwen-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    },
}  # fmt: skip
SHAPES["llama-5b"] = {**SHAPES["llama-8b"], "num_hidden_layers": 20}  # too large for 80 GB, offloads to 128 GiB
SHAPES["qwen-2b"] = {**SHAPES["qwen-1.5b"], "num_hidden_layers": 38}  # 24 GB of weights and moments

INDEX = "model.safetensors.index.json"  # written last
FILE_NUMBERS = 5e8  # weights in one file


def written(folder: Path, name: str, cpu: bool) -> Path:
    """The folder with the model, after a process of its own has written it: nothing stays on the GPU."""
    if not (folder / INDEX).is_file():
        call = [sys.executable, "-W", "ignore", "-m", "benchmarks.shapes", str(folder), name, "cpu" if cpu else "cuda"]
        subprocess.run(call, check=True)
    return folder


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files of a model from its cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_model(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Configuration and random bfloat16 weights, a file a few layers. device: where they are drawn."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, "torch_dtype": "bfloat16"}))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    torch.manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    written: list[Future[None]] = []

    def flush(disk: ThreadPoolExecutor) -> None:
        file = f"model-{len(written):05d}.safetensors"
        names.update(dict.fromkeys(held, file))
        written.append(disk.submit(save_file, dict(held), folder / file, metadata={"format": "pt"}))
        held.clear()

    with ThreadPoolExecutor(4) as disk:  # a file is written while the next one is drawn
        for name, parameter in model.named_parameters():
            made = torch.ones(parameter.shape, dtype=torch.bfloat16)
            if parameter.dim() > 1:
                made = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
            held[name] = torch.zeros_like(made) if "bias" in name else made
            if sum(t.numel() for t in held.values()) > FILE_NUMBERS:
                flush(disk)
        flush(disk)
    for file in written:
        file.result()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), SHAPES[sys.argv[2]], sys.argv[3])
