"""Which files of a hub's repository are downloaded; who looks for them offline must ask for the same ones."""

from __future__ import annotations

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
CODE = ("*.py",)  # only with trust_remote_code
# Second copies of the weights in other shapes, often larger than the ones that are used.
IGNORED = ("original/*", "onnx/*", "openvino/*", "consolidated*", "*.gguf")
DATASET = ("*.json", "*.jsonl", "*.ndjson", "*.csv", "*.parquet", "*.txt", "*.gz", "README.md")


def model_files(weights: bool, code: bool) -> tuple[str, ...]:
    """The patterns for a model: configuration and tokenizer always, weights unless it starts from scratch."""
    return (*(WEIGHTS if weights else ()), *MODEL, *(CODE if code else ()))
