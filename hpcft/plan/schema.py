"""A Plan's dictionary: what earlier schemas meant by not saying it, and frozen dataclasses of what it says.

A leaf that is new needs a new schema, and here what a Plan without it meant: runs outlive releases.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

SCHEMA = 3
READABLE_SCHEMAS = (1, 2, 3)
T = TypeVar("T")

# What a Plan of an earlier schema meant by not saying it: section → leaf → value.
MEANT: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "model": {"quantization": "none", "main_params_dtype": "float32"},
        "train": {"deepspeed": "", "compiled": False, "resharding": True},
        "data": {"num_labels": 0},
        "resources": {"prepare_job": None},
    },
    2: {"train": {"loss_chunk": 0}},
}
# The same of whole sections.
ABSENT: dict[int, dict[str, Any]] = {
    1: {
        "memory": None,
        "objective": {
            "beta": 0.0, "loss_type": "none", "label_smoothing": 0.0, "rpo_alpha": 0.0, "desirable_weight": 1.0,
            "undesirable_weight": 1.0, "simpo_gamma": 0.0, "cpo_alpha": 0.0, "center_rewards_coefficient": 0.0,
            "reference": "none", "labels": [],
        },
    }
}  # fmt: skip


def upgraded(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same Plan in this release's schema."""
    whole = {**ABSENT.get(data["schema"], {}), **data}
    for schema in range(data["schema"], SCHEMA):
        for section, leaves in MEANT[schema].items():
            if isinstance(whole.get(section), Mapping):
                whole[section] = {**leaves, **whole[section]}
    return {**whole, "schema": SCHEMA}


def build(kind: type[T], data: Mapping[str, Any]) -> T:
    """A frozen dataclass from its dictionary, nested ones included; a missing or unknown key is an error."""
    hints = typing.get_type_hints(kind)
    if not isinstance(data, Mapping):
        raise TypeError(f"expected a {kind.__name__}, found {data!r}")
    if unknown := set(data) - set(hints):
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: _value(hints[name], value) for name, value in data.items()})


def _value(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(Any, kind), value)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(a for a in arguments if a is not type(None)), value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value
