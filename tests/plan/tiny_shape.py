"""A shape to reckon by hand, and Plans of it on GPUs."""

from __future__ import annotations

from typing import Any

from hpcft.plan.hardware import hardware
from hpcft.plan.memory import gpu_parts, gpu_parts_at, host_parts
from hpcft.plan.plan import Plan
from hpcft.plan.shape import Shape, shape_of
from tests.plan.models import TINY
from tests.plans import layout, plan

LAYER, ROOT = 592, 520  # its weights, as test_shape counts them
HEAD = 32 * 8  # as many as the embedding's
ALL = 4 * LAYER + ROOT
TOKENS = 2 * 64  # of one forward pass
H100S = hardware(gpu_type="h100", fabric="infiniband")


def tiny() -> Shape:
    """4 layers of width 8, 4 heads and 2 key heads of 2, a feed-forward of 16, 32 words."""
    shape = shape_of(TINY)
    assert shape is not None
    return shape


def on_gpus(
    strategy: str = "ddp", kind: str = "full", nodes: int = 1, ranks: int = 1, recomputation: str = "none",
    attention: str = "auto", dropout: float = 0.0, quantization: str = "none", dtype: str = "bfloat16",
    main_params: str = "float32", **more: Any,
) -> Plan:  # fmt: skip
    """A Plan of two windows of 64 tokens a forward pass; further words are degrees of the mesh, else sections."""
    degrees = {name: more.pop(name) for name in ("dp_replicate", "dp", "tp") if name in more}
    return plan(
        model={
            "dtype": dtype, "attention": attention, "quantization": quantization, "main_params_dtype": main_params,
        },
        tuner={"kind": kind, "dropout": dropout},
        train={"strategy": strategy, "recomputation": recomputation},
        layout=layout(nodes, ranks, **degrees),
        resources={"accelerator": "cuda", "gpu_type": "h100"},
        **more,
    )  # fmt: skip


def on_gpu(made: Plan) -> dict[str, int]:
    """Bytes of each part."""
    return {part.name: part.bytes for part in gpu_parts(made, tiny())}


def parts_at(made: Plan, moment: str, of: Shape | None = None) -> dict[str, int]:
    """Bytes of each part at a moment of the step."""
    return {part.name: part.bytes for part in gpu_parts_at(made, of or tiny(), moment)}


def on_host(made: Plan) -> dict[str, int]:
    """Bytes of each part of a node's own memory."""
    return {part.name: part.bytes for part in host_parts(made, tiny())}
