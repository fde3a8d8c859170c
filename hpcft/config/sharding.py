"""DeepSpeed's and FSDP's words become ours: a strategy, what is kept of a DeepSpeed file, and a note for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.config import deepspeed, fsdp
from hpcft.config.aliases import SHARDING, says_nothing
from hpcft.config.deepspeed import DeepSpeed, GivesWay
from hpcft.config.jsonfile import Settings, read_settings
from hpcft.config.leaves import leaf_sections
from hpcft.config.run import RunConfig
from hpcft.config.source import Given, spoken
from hpcft.errors import Problem, Refusal, refuse

_STAGED: tuple[str, ...] = ("deepspeed", "zero_stage")
_UNDECIDED = (None, "auto")  # strategies that leave the choice to a file


def settle(
    leaves: dict[str, Given], beside: Path | None, problems: list[Problem], notes: list[str]
) -> tuple[GivesWay, ...]:
    """Take these words out of ``leaves`` and put what they mean there; what gives way to keys of the run is returned.

    beside: the run's file, near which other files are looked for. What is wrong is added to ``problems``.
    """
    words = {name: leaves.pop(name) for name in (*SHARDING, "deepspeed") if name in leaves}
    sharded = {name: given for name, given in words.items() if not says_nothing(name, given.value)}
    stage = {name: sharded.pop(name) for name in _STAGED if name in sharded}
    if "fsdp" in words and "fsdp" not in sharded:
        sharded = {}  # `fsdp: ""` beside a map of defaults, as trainers write their settings down
    try:
        if sharded:
            notes += [f"{given.word} has no effect here: {_first(sharded).word} is given too, and FSDP2 is used"
                      for given in stage.values()]  # fmt: skip
            return _fsdp(leaves, sharded, beside, notes)
        return _deepspeed(leaves, stage, beside, notes)
    except Refusal as refusal:
        problems += refusal.problems
        return ()


def gave_way(ways: tuple[GivesWay, ...], run: RunConfig) -> list[str]:
    """A note for each setting that the run's own key overrides; none where both say the same."""
    notes = []
    for way in ways:
        section = leaf_sections()[way.leaf]
        ours = getattr(getattr(run, section), way.leaf)
        if ours != way.value:
            said = "" if isinstance(way.value, (Mapping, list)) or section == "model" else f" {spoken(way.value)}"
            notes.append(f"{way.what}{said} gives way to {way.leaf}: {'null' if ours is None else spoken(ours)}")
    return notes


def _first(words: Mapping[str, Given]) -> Given:
    return next(iter(words.values()))


def _deepspeed(
    leaves: dict[str, Given], words: Mapping[str, Given], beside: Path | None, notes: list[str]
) -> tuple[GivesWay, ...]:
    if not words:
        return ()
    if len(words) > 1:
        raise refuse("zero_stage: deepspeed says it too", where=words["zero_stage"].origin, hint="remove one of them")
    name, given = next(iter(words.items()))
    read = _word(name, given) or deepspeed.read(read_settings(given, beside, tuple(deepspeed.WORDS)))
    strategy = _strategy(leaves, given, read)
    notes += [f"{given.word}: {key} has no effect here: {why}" for key, why in read.set_aside.items()]
    notes += _more(given, read, strategy)
    if text := read.text(strategy):
        leaves["deepspeed"] = Given(text, given.origin, given.word)
    return tuple(dataclasses.replace(way, what=f"{given.word}: {way.what}") for way in read.gives_way)


def _word(name: str, given: Given) -> DeepSpeed | None:
    """``zero2_offload`` or a stage's number as a file that says the same; None for anything else."""
    word = str(given.value).strip().lower()
    if name == "zero_stage":
        if word not in ("0", "1", "2", "3"):
            raise refuse("zero_stage: no such stage", where=given.origin, value=given.value, choices=range(4))
        word = f"zero{word}"
    if word not in deepspeed.WORDS:
        return None
    offload = {"2": ["optimizer"], "3": ["optimizer", "weights"]}[word[4]] if "offload" in word else []
    return DeepSpeed(int(word[4]), frozenset(offload), {}, (), {})


def _strategy(leaves: dict[str, Given], given: Given, read: DeepSpeed) -> str:
    """The strategy of the run: its own, or the one that the file names. Raises Refusal where their stages differ."""
    said = leaves.get("strategy")
    if said is None or said.value in _UNDECIDED:
        if read.strategy:
            leaves["strategy"] = Given(read.strategy, given.origin, given.word)
        return read.strategy or "ddp"
    stage = "0" if said.value == "ddp" else str(said.value).removeprefix("zero")[:1]
    if read.stage is not None and read.strategy != said.value and stage != str(read.stage):
        raise refuse(f"strategy: {said.value}, but {given.word} at {given.origin} says stage {read.stage}",
                     where=said.origin, value=said.value, choices=(read.strategy or "",),
                     hint=f"leave out strategy, or {given.word}")  # fmt: skip
    return str(said.value)


def _more(given: Given, read: DeepSpeed, strategy: str) -> list[str]:
    """What the strategy shards or offloads otherwise than the file said."""
    if read.strategy and read.strategy != strategy:
        return [f"{given.word}: {read.strategy} gives way to strategy: {strategy}"]
    if read.stage == 1 and read.offload:
        return [f"{given.word}: stage 1 with offload runs as {strategy}, which shards the gradients too"]
    if read.stage == 3 and len(read.offload) == 1:
        return [f"{given.word}: {strategy} keeps optimizer and weights in host memory, both"]
    return []


def _fsdp(
    leaves: dict[str, Given], words: dict[str, Given], beside: Path | None, notes: list[str]
) -> tuple[GivesWay, ...]:
    first = _first(words)
    given, config = words.pop("fsdp", None), _config(words, beside)
    value = given.value if given else None
    if given and (isinstance(value, Mapping) or str(value).lstrip().startswith("{") or str(value).endswith(".json")):
        whole = read_settings(given, beside, tuple(fsdp.WORDS))
        value, config = _both(whole, config)
    replicas = "dp_replicate" in leaves and str(leaves["dp_replicate"].value) != "1"
    read = fsdp.read(value, first.word, first.origin, config, replicas)
    notes += read.notes
    said = leaves.get("strategy")
    if said is None or said.value in _UNDECIDED:
        leaves["strategy"] = Given(read.strategy, first.origin, first.word)
    elif str(said.value).partition("_")[0] != read.strategy.partition("_")[0]:
        raise refuse(f"strategy: {said.value}, but {first.word} at {first.origin} says {read.strategy}",
                     where=said.origin, value=said.value, choices=(read.strategy,),
                     hint=f"leave out strategy, or {first.word}")  # fmt: skip
    elif said.value != read.strategy:
        notes.append(f"{first.word}: {read.strategy} gives way to strategy: {said.value}")
    what = f"{first.word}: activation_checkpointing"
    return (GivesWay(what, "full", "gradient_checkpointing"),) if read.recomputes else ()


def _config(words: Mapping[str, Given], beside: Path | None) -> Settings | None:
    """fsdp_config and the flags that are its keys, as one."""
    flags: dict[str, Any] = {name: given.value for name, given in words.items() if name != "fsdp_config"}
    if "fsdp_config" not in words:
        return Settings(flags, "fsdp", _first(words).origin) if flags else None
    config = read_settings(words["fsdp_config"], beside, ())
    return dataclasses.replace(config, tree={**config.tree, **flags})


def _both(whole: Settings, config: Settings | None) -> tuple[Any, Settings]:
    """A file that says ``fsdp`` and ``fsdp_config``, or is the second of them itself."""
    inner = whole.part("fsdp_config")
    tree = {**{key: value for key, value in whole.tree.items() if key not in ("fsdp", "fsdp_config")}, **inner}
    return whole.value("fsdp"), dataclasses.replace(whole, tree={**tree, **(config.tree if config else {})})
