"""The leaves of a run: which section each stands in, which take several values, which may be null."""

from __future__ import annotations

import functools
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpcft.config.aliases import ALIASES
from hpcft.config.run import RunConfig, Section


def sections() -> dict[str, tuple[str, ...]]:
    """Section name → its leaves in order; the words on top of a run file stand under the empty name."""
    table = {
        name: tuple(field.annotation.model_fields)
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    return {"": tuple(name for name in RunConfig.model_fields if name not in table), **table}


@functools.cache
def leaf_sections() -> dict[str, str]:
    """Leaf name → its section ("" on top)."""
    return {leaf: section for section, leaves in sections().items() for leaf in leaves}


@functools.cache
def list_names() -> frozenset[str]:
    """Every spelling of a leaf that takes several values."""
    models = [RunConfig, *(RunConfig.model_fields[s].annotation for s in sections() if s)]
    lists = {
        leaf
        for model in models
        for leaf, field in typing.cast(type[BaseModel], model).model_fields.items()
        if typing.get_origin(field.annotation) is tuple
    }
    return frozenset(lists | {alias for alias, leaf in ALIASES.items() if leaf in lists})


@functools.cache
def nullable(leaf: str) -> bool:
    """Whether null is a value of the leaf."""
    return type(None) in typing.get_args(field(leaf).annotation)


def required(leaf: str) -> bool:
    """Whether a run must say it."""
    return field(leaf).is_required()


def field(leaf: str) -> FieldInfo:
    """What the model says of the leaf."""
    section = leaf_sections()[leaf]
    model = RunConfig.model_fields[section].annotation if section else RunConfig
    return typing.cast(type[BaseModel], model).model_fields[leaf]
