"""A DeepSpeed file taken apart: what names a strategy, what is kept beside ours, what gives way to a key of the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpcft.catalog import STRATEGIES
from hpcft.config import deepspeed_keys as keys
from hpcft.config.jsonfile import Settings
from hpcft.config.source import spoken
from hpcft.errors import Problem, Refusal

# ms-swift's words → strategy
WORDS: dict[str, str] = {"zero0": "ddp", **{name: name for name in STRATEGIES if name.startswith("zero")}}

_Tables = tuple[Mapping[str, type], Mapping[str, str], Mapping[str, str], Collection[str]]


@dataclass(frozen=True)
class GivesWay:
    """A setting of another tool's file, and the key of the run that is used instead."""

    what: str
    value: Any
    leaf: str


@dataclass(frozen=True)
class DeepSpeed:
    """stage: None where the file leaves it to us; offload: what it wants in host memory; kept: beside ours."""

    stage: int | None
    offload: frozenset[str]
    kept: Mapping[str, Any]
    gives_way: tuple[GivesWay, ...]
    set_aside: Mapping[str, str]

    @property
    def strategy(self) -> str | None:
        """The strategy of this stage and offload, or the nearest that saves as much."""
        if self.stage in (None, 0):
            return None if self.stage is None else "ddp"
        stage = 2 if self.stage == 1 and "optimizer" in self.offload else self.stage
        return f"zero{stage}" + ("_offload" if self.offload else "")

    def text(self, strategy: str) -> str:
        """What is kept beside ``strategy``, as canonical JSON; "" for nothing. How to offload goes with offloading."""
        if not strategy.startswith("zero"):
            return ""
        zero = {
            key: value
            for key, value in self.kept.get("zero_optimization", {}).items()
            if key not in keys.OFFLOADS or keys.OFFLOADS[key] in STRATEGIES[strategy].offload
        }
        kept = {**self.kept, "zero_optimization": zero}
        said = {key: value for key, value in kept.items() if value != {}}
        return json.dumps(said, sort_keys=True, separators=(",", ":")) if said else ""


def read(settings: Settings) -> DeepSpeed:
    """Raises Refusal with every problem of the file."""
    problems: list[Problem] = []
    kept: dict[str, Any] = {}
    aside: dict[str, str] = {}
    for key, value in settings.tree.items():
        if not _says(value) or key in ("zero_optimization", "optimizer", "scheduler") or (key,) in keys.GIVES_WAY:
            continue  # looked at below
        known = (
            *keys.TOP_KEPT,
            *keys.TOP_SET_ASIDE,
            *keys.TOP_REFUSED,
            *(path[0] for path in keys.GIVES_WAY),
            "zero_optimization",
        )
        _sort(settings, (key,), (keys.TOP_KEPT, keys.TOP_SET_ASIDE, keys.TOP_REFUSED, known), kept, aside, problems)
    if str(kind := settings.value("optimizer", "type") or "adamw").lower() not in ("adam", "adamw", "auto"):
        aside[f"optimizer.type {kind}"] = keys.OPTIMIZER
    stage, offload, zero = _zero(settings, aside, problems)
    if problems:
        raise Refusal(problems)
    return DeepSpeed(stage, offload, {**kept, "zero_optimization": zero}, tuple(_gives_way(settings)), aside)


def _sort(
    settings: Settings, path: tuple[str, ...], tables: _Tables, kept: dict[str, Any], aside: dict[str, str],
    problems: list[Problem],
) -> None:  # fmt: skip
    """One key into what is kept, what is set aside, or the problems. tables: kept, set aside, refused, all names."""
    ours, idle, refused, known = tables
    *above, key = path
    name, value = keys.OLD_NAMES.get(key, key), settings.value(*path)
    if name in ours:
        if (said := _as_kind(value, ours[name])) is None:
            what = f"{'.'.join(path)}: must be {keys.KINDS[ours[name]]}"
            problems.append(Problem(what, settings.where(*path), spoken(value)))
        else:
            kept[name] = said
    elif name in idle:
        aside[".".join(path)] = idle[name]
    elif name in refused:
        if value is True or value not in (False, 0, 1, -1):
            what = f"{'.'.join(path)}: not in this release"
            problems.append(Problem(what, settings.where(*path), spoken(value), hint=refused[name]))
    else:
        problems.append(settings.unknown(key, [*known, *keys.OLD_NAMES], *above))


def _zero(
    settings: Settings, aside: dict[str, str], problems: list[Problem]
) -> tuple[int | None, frozenset[str], dict[str, Any]]:
    """Stage, what is offloaded, and what is kept of the section."""
    kept: dict[str, Any] = {}
    offload: set[str] = set()
    section = settings.part("zero_optimization")
    known = ("stage", *keys.OFFLOADS, *keys.LEGACY_OFFLOADS, *keys.ZERO_KEPT, *keys.ZERO_SET_ASIDE, *keys.ZERO_REFUSED)
    for key, value in section.items():
        if key == "stage" or not _says(value):
            continue
        if key in keys.OFFLOADS:
            wanted, how = _offloaded(settings, key, problems)
            offload |= {keys.OFFLOADS[key]} if wanted else set()
            kept |= {key: how} if wanted and how else {}
        elif key in keys.LEGACY_OFFLOADS:
            offload |= {keys.LEGACY_OFFLOADS[key]} if value is True else set()
        else:
            tables: _Tables = (keys.ZERO_KEPT, keys.ZERO_SET_ASIDE, keys.ZERO_REFUSED, known)
            _sort(settings, ("zero_optimization", key), tables, kept, aside, problems)
    stage = _stage(settings, section, problems)
    idle = offload - (set() if stage == 0 else {"optimizer"} if stage in (1, 2) else {"optimizer", "weights"})
    aside |= {
        f"zero_optimization.{key}": f"stage {stage} shards no {part}"
        for key, part in keys.OFFLOADS.items()
        if part in idle
    }
    return stage, frozenset(offload - idle), kept


def _stage(settings: Settings, section: Mapping[str, Any], problems: list[Problem]) -> int | None:
    """The stage: 0 where nothing is said of it, as in DeepSpeed; None for auto."""
    stage = section.get("stage", 0)
    if stage == "auto":
        return None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        where = settings.where("zero_optimization", "stage")
        problems.append(Problem("zero_optimization.stage: no such stage", where, spoken(stage), ("0", "1", "2", "3")))
        return None
    return int(stage)


def _offloaded(settings: Settings, key: str, problems: list[Problem]) -> tuple[bool, dict[str, Any]]:
    """Whether the file offloads this, and how."""
    path = ("zero_optimization", key)
    section = settings.value(*path)
    if not isinstance(section, Mapping):
        what = f"{'.'.join(path)}: must be a map of keys and values"
        problems.append(Problem(what, settings.where(*path), spoken(section), hint='{"device": "cpu"}'))
        return False, {}
    device = section.get("device", "none")
    if device not in ("cpu", "none", "auto"):
        hint = "device: cpu keeps it in host memory" if device == "nvme" else ""
        what = f"zero_optimization.{key}.device: {'not in this release' if device == 'nvme' else 'no such device'}"
        problems.append(Problem(what, settings.where(*path, "device"), spoken(device), ("cpu", "none"), hint))
    how: dict[str, Any] = {}
    for inner, value in section.items():
        if inner != "device" and _says(value):
            known = (*keys.OFFLOAD_KEPT, *keys.OFFLOAD_IDLE, "device")
            tables: _Tables = (keys.OFFLOAD_KEPT, keys.OFFLOAD_IDLE, {}, known)
            _sort(settings, (*path, inner), tables, how, {}, problems)
    return device == "cpu", how


def _gives_way(settings: Settings) -> Iterator[GivesWay]:
    for path, leaf in keys.GIVES_WAY.items():
        value = settings.value(*path)
        if _says(value):
            value = {"fp16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}.get(path[0], value)
            yield GivesWay(".".join(path), value, leaf)
    betas = settings.value("optimizer", "params", "betas")
    for number, beta in enumerate(betas[:2] if isinstance(betas, list) else (), 1):
        if _says(beta):
            yield GivesWay("optimizer.params.betas", beta, f"adam_beta{number}")


def _says(value: Any) -> bool:
    """Whether a setting says anything: not null, not auto, not a section that is switched off."""
    if isinstance(value, Mapping):
        enabled = value.get("enabled")
        return enabled is True if "enabled" in value else any(_says(inner) for inner in value.values())
    return value is not None and value != "auto" and value != "none"


def _as_kind(value: Any, kind: type) -> Any:
    """``value`` where it is of the kind, 5e8 as the whole number it is; None where it is not."""
    if kind is dict:
        said = {key: inner for key, inner in value.items() if _says(inner)} if isinstance(value, Mapping) else None
        return said and _finite(said)
    if kind is bool:
        return value if isinstance(value, bool) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53
    return int(value) if number and value == int(value) else None


def _finite(section: dict[str, Any]) -> dict[str, Any] | None:
    """The section, None where a number in it is none."""
    try:
        json.dumps(section, allow_nan=False)
    except ValueError:
        return None
    return section
