"""From files and words to a run or a cluster profile: every problem at once, each value with its origin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.config.aliases import ALIASES, REFUSED, SET_ASIDE, SHARDING, SWITCHES, rename, says_nothing
from hpcft.config.cluster import ClusterProfile
from hpcft.config.complaints import validate
from hpcft.config.leaves import leaf_sections, list_names, nullable, sections
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
    spoken,
)
from hpcft.errors import Problem, Refusal, near, refuse
from hpcft.resources import templates


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
    layers, readable = _read_layers(file, problems)
    layers.append(dict(said.leaves))
    leaves, notes = _merge(layers, problems)
    ways = settle(leaves, file, problems, notes)
    places = {_path(leaf): given for leaf, given in leaves.items()}
    shown = str(file) if file else COMMAND_LINE
    run = validate(RunConfig, _nest(leaves), places, problems, shown) if readable else None
    if problems or run is None:
        raise Refusal(sorted(problems, key=_line_number))
    run = _mark_local(run)
    notes += gave_way(ways, run)
    origins = {leaf: leaves[leaf].origin if leaf in leaves else "default" for leaf in leaf_sections()}
    return Loaded(run, origins, tuple(notes), file)


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
    """The layers of the run's file, and whether it could be read: a file that cannot be read lacks nothing yet."""
    try:
        return (_file_layers(file, problems) if file else []), True
    except Refusal as refusal:
        problems.extend(refusal.problems)
        return [], False


def _file_layers(file: Path, problems: list[Problem], seen: tuple[Path, ...] = ()) -> list[dict[str, Given]]:
    """The file's leaves after those it extends, nearest last."""
    tree, shown = read_yaml(file)
    leaves = flatten(tree, shown, [name for name in sections() if name], problems)
    extends = leaves.pop("extends", None)
    layers: list[dict[str, Given]] = []
    for base in _as_list(extends.value) if extends and extends.value else []:
        path = file.parent / str(base)
        if not is_file(path):
            hint = f"it is looked for beside {file.name}"
            problems.append(Problem("extends: no such file", extends.origin if extends else shown, str(base), (), hint))
            continue
        if path.resolve() in (*seen, file.resolve()):
            raise refuse("extends: goes in a circle", where=extends.origin if extends else shown, value=str(base))
        layers += _file_layers(path, problems, (*seen, file.resolve()))
    return [*layers, leaves]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _merge(layers: Sequence[Mapping[str, Given]], problems: list[Problem]) -> tuple[dict[str, Given], list[str]]:
    """Later layers win; names become ours; what is refused or unknown becomes a problem, what is set aside a note."""
    merged: dict[str, Given] = {}
    notes: list[str] = []
    for layer in layers:
        own: dict[str, Given] = {}
        for word, given in layer.items():
            try:
                ours = rename(str(word), given.value)
            except Refusal as refusal:
                problems += [dataclasses.replace(p, where=given.origin) for p in refusal.problems]
                continue
            for leaf, value in ours:
                _add(own, leaf, Given(value, given.origin, given.word), given.value, problems, notes)
        merged |= own
    return merged, notes


def _add(own: dict[str, Given], leaf: str, given: Given, said: Any, problems: list[Problem], notes: list[str]) -> None:
    """One leaf into a layer's own. said: the value as it was given."""
    if leaf in SET_ASIDE:
        notes += [f"{given.word} has no effect here: {SET_ASIDE[leaf]}"] if said is not None else []
    elif leaf in REFUSED:
        if not says_nothing(leaf, said):
            problems.append(
                Problem(f"{given.word}: not in this release", given.origin, spoken(said), hint=REFUSED[leaf])
            )
    elif leaf not in leaf_sections() and leaf not in SHARDING:
        problems.append(_unknown(dataclasses.replace(given, value=said), leaf))
    elif leaf not in own:
        own[leaf] = given
    elif own[leaf].value != given.value or (_names(given.word, leaf) and _names(own[leaf].word, leaf)):
        what = f"{given.word}: says the same as {own[leaf].word} at {own[leaf].origin}"
        problems.append(Problem(what, given.origin, hint="remove one of them"))


def _names(word: str, leaf: str) -> bool:
    """Whether a key is a name of the leaf; other words may say the same beside it: ``load_in_4bit`` and ``qlora``."""
    bare = word.rpartition(".")[2].replace("-", "_")
    return ALIASES.get(bare, bare) == leaf


def _unknown(given: Given, leaf: str) -> Problem:
    guess = near(leaf, [*leaf_sections(), *ALIASES, *SWITCHES, *SHARDING], cutoff=0.7)
    own = ALIASES.get(guess, guess)
    section = leaf_sections().get(own, "")
    hint = f"did you mean {guess}?" if guess else "every key is listed by: hpcft init --list"
    if guess in leaf_sections() or guess in ALIASES:
        hint += f" (here: {section + '.' if section else ''}{own})"
    return Problem(f"{given.word}: no such key", given.origin, spoken(given.value), hint=hint)


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
