"""From files and words to a run or a cluster profile: every problem at once, each value with its origin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.config.cluster import ClusterProfile
from hpcft.config.complaints import validate
from hpcft.config.idle import idle
from hpcft.config.leaves import leaf_sections, list_names, nullable, required
from hpcft.config.merging import Merged, merge
from hpcft.config.overrides import read_words
from hpcft.config.run import RunConfig
from hpcft.config.secrets import secrets
from hpcft.config.sharding import gave_way, settle
from hpcft.config.source import (
    COMMAND_LINE,
    Given,
    exists,
    flatten,
    is_file,
    line_of,
    plain,
    read_yaml,
)
from hpcft.config.unknown import section_of
from hpcft.errors import Problem, Refusal, near, refuse
from hpcft.resources import templates

NO_BASE = "extends: no such file"


@dataclass(frozen=True)
class Loaded:
    """A run as configured. origins: leaf → where its value is from; notes: words set aside, each with its reason."""

    run: RunConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    file: Path | None


def load_run(words: Sequence[str]) -> Loaded:
    """The run that a command line describes: an optional YAML file and overrides in any spelling.

    Raises Refusal with every problem found.
    """
    problems: list[Problem] = []
    said = read_words(words, list_names(), problems)
    if len(said.files) > 1:
        problems.append(
            Problem(
                "more than one run file",
                COMMAND_LINE,
                " ".join(said.files),
                hint="give one YAML file; it may say `extends: other.yaml`",
            )
        )
    file = Path(said.files[0]) if said.files else None
    layers, whole = _read_layers(file, problems)
    layers.append(dict(said.leaves))
    merged = merge(layers, problems)
    leaves, notes = merged.leaves, merged.notes
    ways = settle(leaves, file, problems, notes)
    places = {_path(leaf): given for leaf, given in leaves.items()}
    shown = str(file) if file else COMMAND_LINE
    run = validate(RunConfig, _nest(leaves), places, problems, shown, _unread(merged, whole))
    if problems or run is None:
        raise Refusal(sorted(problems, key=_line_number))
    run = _mark_local(run)
    notes += [*gave_way(ways, run), *idle(run, leaves)]
    origins = {leaf: leaves[leaf].origin if leaf in leaves else "default" for leaf in leaf_sections()}
    return Loaded(run, origins, tuple(notes), file)


def _unread(merged: Merged, whole: bool) -> set[tuple[str, ...]]:
    """Places of keys that were said and not understood: they are not missing, and neither are their sections.

    whole: all files could be read; else any key may stand in one of the others.
    """
    paths = {_path(leaf) for leaf in leaf_sections() if leaf in merged.unread or not whole}
    return paths | {path[:1] for path in paths if required(path[-1])}


def _line_number(problem: Problem) -> int:
    """Complaints come in the order of the file's lines, those without a line first."""
    match = re.search(r":([0-9]{1,9})$", problem.where)
    return int(match[1]) if match else 0


def _mark_local(run: RunConfig) -> RunConfig:
    """``models/tiny`` reads like a hub name; where such a folder or file exists it becomes ``./models/tiny``."""

    def local(name: str) -> str:
        path = name.partition("#")[0]
        return f"./{name}" if path[:1].isalnum() and exists(path) else name

    data = run.data.model_copy(
        update={key: tuple(map(local, getattr(run.data, key))) for key in ("dataset", "val_dataset")}
    )
    return run.model_copy(
        update={"model": run.model.model_copy(update={"model": local(run.model.model)}), "data": data}
    )


def load_cluster(name: str | None, beside: Path | None = None, where: str = "") -> tuple[ClusterProfile, str]:
    """The cluster profile called ``name`` (a file, or a name), and where it was found.

    None: ``cluster.yaml`` in the current folder or beside the run file, else ``local``: this machine without Slurm.
    A file is looked for in the current folder, then beside the run file; a name as ``clusters/<name>.yaml`` there,
    then among the profiles hpcft brings. where: the origin of ``name``, for the complaint.
    """
    path = _find_cluster(name, beside, where)
    tree, shown = read_yaml(path)
    problems: list[Problem] = []
    places: dict[tuple[str, ...], Given] = {
        (str(key),): Given(value, line_of(tree, key, shown), str(key)) for key, value in tree.items()
    }
    for key, value in tree.items():
        if isinstance(value, Mapping):
            places |= {(str(key), str(k)): Given(v, line_of(value, k, shown), f"{key}.{k}") for k, v in value.items()}
    profile = validate(ClusterProfile, plain(tree, shown), places, problems, shown)
    problems += secrets(profile, places) if profile else []
    if problems or profile is None:
        raise Refusal(sorted(problems, key=_line_number))
    if profile.partition and profile.partitions and profile.partition not in profile.partitions:
        raise refuse(
            f"partition: {profile.partition} is not among the profile's partitions",
            where=places[("partition",)].origin, choices=sorted(profile.partitions),
        )  # fmt: skip
    return profile, shown


def cluster_names() -> list[str]:
    """Names that load_cluster finds without a path."""
    folders = (Path("clusters"), templates() / "clusters")
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _find_cluster(name: str | None, beside: Path | None, where: str) -> Path:
    if name is None:
        own = [Path("cluster.yaml"), *([beside.parent / "cluster.yaml"] if beside else [])]
        return next((path for path in own if is_file(path)), templates() / "clusters" / "local.yaml")
    if name.endswith((".yaml", ".yml")) or "/" in name:
        meant = [Path(name), *([beside.parent / name] if beside else [])]
        return next((path for path in meant if is_file(path)), meant[0])
    for folder in (Path("clusters"), *([beside.parent / "clusters"] if beside else []), templates() / "clusters"):
        if is_file(folder / f"{name}.yaml"):
            return folder / f"{name}.yaml"
    guess = near(name, cluster_names())
    raise refuse(
        "cluster: no such profile", where=where, value=name, choices=cluster_names(),
        hint=f"did you mean {guess}?" if guess else "write one with: hpcft init --cluster",
    )  # fmt: skip


def _read_layers(file: Path | None, problems: list[Problem]) -> tuple[list[dict[str, Given]], bool]:
    """The layers of the run's file, and whether they are all there: a file that cannot be read lacks nothing yet."""
    known = len(problems)
    try:
        layers = _file_layers(file, problems) if file else []
        return layers, not any(problem.what == NO_BASE for problem in problems[known:])
    except Refusal as refusal:
        problems.extend(refusal.problems)
        return [], False


def _file_layers(file: Path, problems: list[Problem], seen: tuple[Path, ...] = ()) -> list[dict[str, Given]]:
    """The file's leaves after those it extends, nearest last."""
    tree, shown = read_yaml(file)
    leaves = flatten(tree, shown, section_of, problems)
    extends = leaves.pop("extends", None)
    layers: list[dict[str, Given]] = []
    for base in _as_list(extends.value) if extends and extends.value else []:
        path = file.parent / str(base)
        if not is_file(path):
            hint = f"it is looked for beside {file.name}"
            problems.append(Problem(NO_BASE, extends.origin if extends else shown, str(base), (), hint))
            continue
        if path.resolve() in (*seen, file.resolve()):
            raise refuse("extends: goes in a circle", where=extends.origin if extends else shown, value=str(base))
        layers += _file_layers(path, problems, (*seen, file.resolve()))
    return [*layers, leaves]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _path(leaf: str) -> tuple[str, ...]:
    section = leaf_sections()[leaf]
    return (section, leaf) if section else (leaf,)


def _nest(leaves: Mapping[str, Given]) -> dict[str, Any]:
    """Flat leaves as the nested form of RunConfig; a single value for a list becomes a list of one."""
    nested: dict[str, Any] = {}
    for leaf, given in leaves.items():
        value = given.value
        if leaf in list_names() and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]  # dataset: a.jsonl, b.jsonl
        elif leaf in list_names() and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        *sections_above, last = _path(leaf)
        holder = nested.setdefault(sections_above[0], {}) if sections_above else nested
        if value is None and not nullable(leaf):
            continue  # `key:` with nothing behind it is "as if not said"
        holder[last] = value
    return nested
