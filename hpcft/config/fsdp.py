"""The words of FSDP, in flags, maps and files: all of them come to FSDP2, with or without offloading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcft.config.jsonfile import Settings
from hpcft.config.source import spoken
from hpcft.errors import Problem, Refusal, near

# the words behind `fsdp` → what they come to: a strategy, offload, or nothing new
WORDS: dict[str, str] = {
    **dict.fromkeys(("fsdp2", "fsdp", "fsdp1", "full_shard", "shard_grad_op", "true", "on", "yes", "1"), "fsdp"),
    **dict.fromkeys(("hybrid_shard", "hybrid_shard_zero2"), "hybrid"),
    "no_shard": "ddp",
    **dict.fromkeys(("offload", "cpu_offload"), "offload"),
    "auto_wrap": "",
}
_NUMBERS = {"1": "full_shard", "2": "shard_grad_op", "3": "no_shard", "4": "hybrid_shard", "5": "hybrid_shard_zero2"}
_SWITCHES = {**dict.fromkeys(("cpu_offload", "offload_params"), "offload"), "activation_checkpointing": "recompute"}

# key of fsdp_config, with or without fsdp_ in front → why it has no effect, where it has none
KEYS: dict[str, str] = {
    **dict.fromkeys((*_SWITCHES, "sharding_strategy"), ""),
    "version": "FSDP2 does the same",
    **dict.fromkeys(
        ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "ignored_modules"),
        "each decoder layer is wrapped, as the model names it",
    ),
    **dict.fromkeys(
        ("reshard_after_forward", "backward_prefetch", "backward_prefetch_policy", "forward_prefetch",
         "limit_all_gathers"),
        "the plan decides when weights are gathered and let go",
    ),
    **dict.fromkeys(
        ("state_dict_type", "state_dict_config", "final_state_dict_type"),
        "checkpoints are hpcft's own and resume on any layout",
    ),
    **dict.fromkeys(("sync_module_states", "cpu_ram_efficient_loading"), "each rank loads its own part"),
    "use_orig_params": "FSDP2 always does",
    **dict.fromkeys(("mixed_precision", "mixed_precision_policy"), "torch_dtype says it"),
}  # fmt: skip


@dataclass(frozen=True)
class Fsdp:
    """strategy: fsdp, fsdp_offload or ddp; recomputes: whether activations are; notes: what has no effect here."""

    strategy: str
    recomputes: bool
    notes: tuple[str, ...]


@dataclass
class _Heard:
    """What the words have come to so far. meant: strategies, offload, recompute."""

    meant: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def word(self, said: str, word: str, origin: str) -> None:
        """One word of ``fsdp``; an unknown one becomes a problem."""
        if said.lower() in WORDS:
            self.meant.add(WORDS[said.lower()])
            return
        guess = near(said.lower(), WORDS)
        choices = ("full_shard", "auto_wrap", "offload", "no_shard", "fsdp2")
        hint = f"did you mean {guess}?" if guess else "or a JSON file"
        self.problems.append(Problem(f"{word}: no such value", origin, said, choices, hint))

    def aside(self, key: str, why: str) -> None:
        """A key that has no effect."""
        self.notes.append(f"{key} has no effect here: {why}")

    def entry(self, config: Settings, key: str, value: Any) -> None:
        """One key of fsdp_config."""
        name = key.removeprefix("fsdp_")
        if name not in KEYS:
            if value not in (None, False, "", 0):
                self.problems.append(config.unknown(key, [*KEYS, *(f"fsdp_{name}" for name in KEYS)]))
        elif name in _SWITCHES:
            self.meant |= {_SWITCHES[name]} if _on(value) else set()
        elif name == "sharding_strategy" or (name == "reshard_after_forward" and _is_word(value)):
            self.word(_NUMBERS.get(str(value), str(value)), key, config.where(key))
        elif not (_on(value) if name == "reshard_after_forward" else _is_idle(name, value)):
            self.aside(key, KEYS[name])


def read(words: Any, word: str, origin: str, config: Settings | None, replicas: bool) -> Fsdp:
    """words: what stands behind ``fsdp``; config: fsdp_config and its like; replicas: whether dp_replicate is said.

    Raises Refusal with every problem.
    """
    heard = _Heard()
    for said in _split(words):
        heard.word(said, word, origin)
    if config:
        for key, value in config.tree.items():
            heard.entry(config, key, value)
    if "hybrid" in heard.meant and not replicas:
        hint = "strategy: fsdp with dp_replicate: N, for example the number of nodes"
        what = f"{word}: hybrid sharding needs the number of copies"
        heard.problems.append(Problem(what, origin, spoken(words), hint=hint))
    if heard.problems:
        raise Refusal(heard.problems)
    strategy = "ddp" if "ddp" in heard.meant else "fsdp_offload" if "offload" in heard.meant else "fsdp"
    return Fsdp(strategy, "recompute" in heard.meant, tuple(heard.notes))


def _split(words: Any) -> list[str]:
    if words is None:
        return []
    parts = words if isinstance(words, (list, tuple)) else [words]
    return [said for part in parts for said in spoken(part).replace(",", " ").split()]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.lower() not in ("true", "false")


def _is_idle(name: str, value: Any) -> bool:
    """Whether a key without effect is not worth a word."""
    return str(value) == "2" if name == "version" else value in (None, "", [], {})


def _on(value: Any) -> bool:
    """Whether a value switches something on: true, a word for it, or a map such as ``{offload_params: true}``."""
    if isinstance(value, Mapping):
        return any(_on(inner) for inner in value.values())
    return str(value).lower() in ("true", "yes", "on", "1")
