"""The reference pages, made from the models and the catalog, so that they cannot fall behind."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpcft.catalog import FORMATS, KINDS_OF_ROWS, LATER_OBJECTIVES, OBJECTIVES, STRATEGIES, Format
from hpcft.config.aliases import ALIASES, SHARDING, SWITCHES
from hpcft.config.cluster import ClusterProfile, Partition, PrepareJob
from hpcft.config.declined import REFUSED, SET_ASIDE
from hpcft.config.run import RunConfig, Section

GENERATED = "<!-- made by `make golden`; change the sentences in the code -->\n\n"


def run_page() -> str:
    """Every key of a run."""
    parts = [
        GENERATED,
        "# Keys of a run\n\nEvery key works in its section, on top of the file, and as `--key value`.\n\n",
    ]
    top = {n: f for n, f in RunConfig.model_fields.items() if not _is_section(f)}
    parts.append(_keys(top))
    for name, field in RunConfig.model_fields.items():
        if _is_section(field):
            section = typing.cast(type[BaseModel], field.annotation)
            parts.append(f"\n## `{name}`\n\n{section.__doc__}\n\n" + _keys(section.model_fields))
    parts.append("\n## Other names for the same keys\n\n" + _pairs(("you wrote", "it is"), ALIASES.items()))
    parts.append("\n## Switches of other tools\n\n" + _pairs(("you wrote", "it is"), _switches()))
    parts.append("\n## Words that name a strategy\n\n" + _pairs(("you wrote", "it is"), SHARDING.items()))
    parts.append("\n## Accepted, without effect\n\n" + _pairs(("key", "because"), SET_ASIDE.items()))
    parts.append("\n## Refused in this release\n\nUnless they are switched off: null, false, none; 1 for an axis.\n\n")
    parts.append(_pairs(("key", "instead"), REFUSED.items()))
    return "".join(parts)


def cluster_page() -> str:
    """Every key of a cluster profile."""
    head = f"{GENERATED}# Keys of a cluster profile\n\n"
    partition = "\n## A partition\n\n" + _keys(Partition.model_fields)
    preparing = "\n## The job that prepares data\n\n" + _keys(PrepareJob.model_fields)
    return head + _keys(ClusterProfile.model_fields) + partition + preparing


def catalog_page() -> str:
    """Strategies, objectives and data formats."""
    parts = [GENERATED, "# What can be chosen\n\n## Strategies\n\n"]
    parts.append(_pairs(("strategy", ""), ((row.name, row.about) for row in STRATEGIES.values())))
    parts.append("\n## Objectives\n\n")
    parts.append(_pairs(("task", ""), ((row.name, row.about) for row in OBJECTIVES.values())))
    parts.append("\nNot in this release:\n\n" + _pairs(("task", "instead"), LATER_OBJECTIVES.items()))
    parts.append("\n## Data formats\n\nFound by their keys, file by file; a file of mixed shapes is refused.\n")
    parts.append("A task takes one kind of record; within a kind, each shape that follows will do.\n")
    for kind, what in KINDS_OF_ROWS.items():
        parts.append(f"\n### {what[:1].upper()}{what[1:]}\n")
        parts += [_format(row) for row in FORMATS.values() if row.rows == kind]
    return "".join(parts)


def _format(row: Format) -> str:
    return f"\n#### `{row.name}`\n\n{row.about[:1].upper()}{row.about[1:]}.\n\n```json\n{row.sample}\n```\n"


def _switches() -> Iterable[tuple[str, str]]:
    """Each value of each switch, and what it says here."""
    for name, table in SWITCHES.items():
        for value, ours in table.items():
            said = f"`{ours[0]}: {_text(ours[1])}`" if ours else "what is done anyway"
            yield f"{name}: {_text(value)}", said


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _keys(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | values | default | |\n| --- | --- | --- | --- |\n"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{_default(field)}`"
        rows.append(f"| `{name}` | {_values(field.annotation)} | {default} | {_cell(field.description or '')} |\n")
    return "".join(rows)


def _default(field: FieldInfo) -> str:
    return _text(field.get_default(call_default_factory=True))


def _values(kind: Any) -> str:
    """A type as a person reads it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of {_values(inner[0])}"
    if origin is dict:
        return f"map to {_values(inner[1])}"
    if origin is typing.Annotated:
        return _values(inner[0])
    if inner:
        return " or ".join(_values(part) for part in inner if part is not type(None))
    names = {str: "text", int: "number", float: "number", bool: "`true`, `false`"}
    return names.get(kind, getattr(kind, "__name__", str(kind)).lower())


def _pairs(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"| `{left}` | {_cell(right)} |\n" for left, right in rows)
    return f"| {head[0]} | {head[1]} |\n| --- | --- |\n{body}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
