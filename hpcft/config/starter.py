"""Starters: a run or a profile as YAML with a teaching comment over each key, made from the models' own sentences.

Nothing here is written by hand, so a starter cannot fall behind the models it explains.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpcft.clock import clock
from hpcft.config.cluster import ClusterProfile
from hpcft.config.fields import minutes
from hpcft.config.run import RunConfig, Section
from hpcft.config.source import plain, read_yaml

WIDTH = 110


def run_starter(chosen: Path, cluster: ClusterProfile | None = None) -> str:
    """A run file: the values of the starter ``chosen`` active, every other key commented out at its default.

    cluster: the profile it is to fit on; None: it asks for what its template says.
    """
    values = _fitted(_values(chosen), cluster) if cluster else _values(chosen)
    lines = [
        "# A run. Active lines are set; a commented line shows the default. Every key also works as --key value.",
        "",
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            inner = values.get(name, {})
            lines += [f"# ---- {section.__doc__}", f"{name}:"]
            for leaf, leaf_field in section.model_fields.items():
                lines += _leaf(leaf, leaf_field, inner, indent="  ")
            lines.append("")
        else:
            lines += [*_leaf(name, field, values, indent=""), ""]
    return "\n".join(lines).rstrip() + "\n"


def _fitted(values: Mapping[str, Any], cluster: ClusterProfile) -> dict[str, Any]:
    """``values`` with no more nodes, ranks and time than the cluster's default partition has."""
    slurm = dict(values["slurm"])
    limits = cluster.partitions.get(cluster.partition or "")
    most = {
        "nodes": [1] if cluster.scheduler == "none" else [cluster.max_nodes, limits.max_nodes if limits else None],
        "nproc_per_node": [cluster.gpus_per_node or cluster.cores_per_node],
    }
    for key, bounds in most.items():
        if key in slurm:
            slurm[key] = min([slurm[key], *(bound for bound in bounds if bound)])
    if limits and limits.max_time and minutes(slurm["time"]) > limits.max_time:
        slurm["time"] = clock(limits.max_time)
    return {**values, "slurm": slurm}


def cluster_starter(chosen: Path) -> str:
    """A cluster profile in the same form, from one of the profiles that hpcft brings."""
    values = _values(chosen)
    lines = ["# A cluster profile: what every run on this cluster has in common. Ask `sinfo -o '%P %l %D %c %G'`.", ""]
    for name, field in ClusterProfile.model_fields.items():
        lines += [*_leaf(name, field, values, indent=""), ""]
    return "\n".join(lines).rstrip() + "\n"


def schema(model: type[BaseModel]) -> str:
    """JSON schema for editors (yaml-language-server and the like)."""
    return json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def _values(path: Path) -> Mapping[str, Any]:
    tree, shown = read_yaml(path)
    values = plain(tree, shown)
    assert isinstance(values, dict)
    return values


def _leaf(name: str, field: FieldInfo, values: Mapping[str, Any], *, indent: str) -> list[str]:
    """The comment and the line of one key."""
    comment = textwrap.wrap(field.description or "", WIDTH - len(indent) - 2)
    value = values[name] if name in values else field.get_default(call_default_factory=True)
    line = f"{name}: {_yaml(value)}"
    return [*(f"{indent}# {part}" for part in comment), f"{indent}{line}" if name in values else f"{indent}# {line}"]


def _yaml(value: Any) -> str:
    """One value in YAML's flow form: JSON is YAML, without quotes where a plain word needs none."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, str) and value and value.replace("-", "a").replace("_", "a").replace("/", "a").isalnum():
        return json.dumps(value) if value.isdigit() or value in ("true", "false", "null", "none") else value
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False) if not repr(value).startswith("Pydantic") else ""
