"""``decide``: the named strategy if it fits, for ``auto`` the fastest that does; else what would fit, with numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from hpcft.catalog import AUTO, STRATEGIES
from hpcft.errors import Refusal, refuse
from hpcft.plan.hardware import GIB
from hpcft.plan.memory import gpu_parts, host_parts
from hpcft.plan.plan import Plan
from hpcft.plan.prediction import Hardware
from hpcft.plan.shape import Shape
from hpcft.plan.ways import (
    Draft,
    Question,
    Way,
    clearly_too_large,
    fits,
    host_overflows,
    host_unknown,
    memory_of,
    option,
    pace,
)

TIE = 1.1  # a prediction this much slower is not slower: the simpler way is taken
SHOWN = 4  # ways that are kept for the page
LARGEST = 3  # parts that a refusal spells out


def decide(question: Question, wanted: Way) -> Plan:
    """The Plan with its memory. Raises Refusal where ``wanted`` clearly does not fit, or for auto nothing does."""
    if wanted.strategy == AUTO:
        return _fastest(question, wanted)
    plan = question.fitted(question.draft(wanted))
    others = question.weighed(Way(AUTO, nodes=wanted.nodes, ranks_per_node=wanted.ranks_per_node))
    cheaper = [other for other in others if fits(other) and memory_of(other).total < memory_of(plan).total]
    cheapest = sorted(cheaper, key=pace)[:1]
    if clearly_too_large(plan):
        raise _does_not_fit(question, plan, cheapest or _with_adapters(question, wanted))
    return _with(plan, cheapest, "")


def check_known(model: str, shape: Shape | None, hardware: Hardware) -> None:
    """Raises Refusal, naming what could be said instead, where auto has nothing to choose by."""
    missing = hint = ""
    if shape is None:
        missing = f"the shape of {model} is not known, no config.json of a known kind can be read there"
        hint = "the model's folder; a hub's model is looked up by hpcft submit, and by plan once it is in the cache"
    elif hardware.gpu_bytes is None:
        missing, hint = "the memory of this cluster's GPUs is not known", "gpu_memory (GiB) in the cluster profile"
    if missing:
        named = [name for name, row in STRATEGIES.items() if not row.offload]
        raise refuse(
            f"parallel.strategy: {missing}", value=AUTO, choices=named, hint=f"name a strategy, or give {hint}"
        )


def _fastest(question: Question, wanted: Way) -> Plan:
    weighed = question.weighed(wanted)
    possible = [plan for plan in weighed if fits(plan)]
    if not weighed:
        raise _no_way(question, wanted)
    if not possible:
        # Of what offloads to a node of unknown memory it cannot be said by how much it does not fit.
        least = min(weighed, key=lambda plan: (_unknown(plan), memory_of(plan).total))
        raise _does_not_fit(question, least, _with_adapters(question, wanted))
    # The node's memory and cores are the least certain of all predictions, so they are left alone where they can be.
    possible = [plan for plan in possible if not STRATEGIES[plan.train.strategy].offload] or possible
    best = min(map(pace, possible))
    chosen = next(plan for plan in possible if pace(plan) <= best * TIE)
    rest = sorted((plan for plan in weighed if plan is not chosen), key=lambda plan: (not fits(plan), pace(plan)))
    return _with(chosen, [chosen, *rest][:SHOWN], _reason(chosen, len(possible), best))


def _unknown(plan: Plan) -> bool:
    return bool(STRATEGIES[plan.train.strategy].offload) and host_unknown(memory_of(plan))


def _reason(chosen: Plan, possible: int, best: float) -> str:
    if possible == 1:
        return "the only one that fits"
    if best == 0:
        return f"the simplest of {possible} that fit; the speed of this GPU is not known"
    if pace(chosen) > best:
        return f"the simplest of {possible} that fit, and as fast as the fastest within {TIE - 1:.0%}"
    return f"the fastest of {possible} that fit"


def _with(plan: Plan, options: Sequence[Plan], reason: str) -> Plan:
    memory = dataclasses.replace(memory_of(plan), options=tuple(map(option, options)), reason=reason)
    return dataclasses.replace(plan, memory=memory)


def _no_way(question: Question, wanted: Way) -> Refusal:
    """A batch that does not divide says so itself; else no strategy has the degrees that were asked for."""
    question.draft(dataclasses.replace(wanted, strategy="ddp", tp=1, dp_replicate=1))
    return refuse(
        "parallel.strategy: auto finds no way with these degrees",
        value=f"tp {wanted.tp}, dp_replicate {wanted.dp_replicate}", hint="leave them out, or name a strategy",
    )  # fmt: skip


def _does_not_fit(question: Question, plan: Plan, instead: Sequence[Plan]) -> Refusal:
    """What is predicted of ``plan``, where it goes, and what would fit: ``instead`` here, else more GPUs."""
    memory, layout = memory_of(plan), plan.layout
    on_host = bool(STRATEGIES[plan.train.strategy].offload) and host_overflows(memory)
    has = memory.hardware.host_bytes if on_host else memory.hardware.gpu_bytes
    parts = host_parts(plan, memory.shape) if on_host else gpu_parts(plan, memory.shape)
    largest = sorted(parts, key=lambda part: -part.bytes)[:LARGEST]
    where = "a node" if on_host else "a GPU"
    total = memory.host if on_host else memory.total
    others = (f"{_place(other, plan)}{described(other)}" for other in [*instead, *_smallest(question, plan)])
    choices = list(dict.fromkeys(others))
    return refuse(
        f"parallel.strategy: {plan.model.path} ({plan.tuner.kind}) with {named(plan)} does not fit on {layout.nodes} × "
        f"{layout.ranks_per_node} GPUs: {gib(total)} GiB {where} of {gib(has or 0)}",
        value="; ".join(f"{part.name} {gib(part.bytes)} GiB = {part.arithmetic}" for part in largest),
        choices=choices, hint=_hint(plan, bool(choices)),
    )  # fmt: skip


def _hint(plan: Plan, choices: bool) -> str:
    if plan.train.recomputation != "full":
        return "gradient_checkpointing: full keeps fewer activations"
    if host_unknown(memory_of(plan)):
        return "say node_memory in the cluster profile, and what offloads to it is weighed too"
    return "take one of these" if choices else "a smaller model, a shorter max_length, or adapters (tuner_type: lora)"


def _place(other: Plan, plan: Plan) -> str:
    """What of ``other`` is not as in ``plan``, beside the strategy."""
    said = []
    if other.layout.world_size != plan.layout.world_size:
        said.append(f"{other.layout.nodes} × {other.layout.ranks_per_node} GPUs")
    if other.tuner.kind != plan.tuner.kind:
        said.append(f"tuner_type: {other.tuner.kind}")
    if other.model.quantization != plan.model.quantization:
        said.append(f"a base in {other.model.quantization}")
    if other.model.main_params_dtype != plan.model.main_params_dtype:
        said.append(f"main_params_dtype: {other.model.main_params_dtype}")
    return f"{' and '.join(said)} with " if said else ""


def named(plan: Plan) -> str:
    """``fsdp``, ``fsdp and tp 2``."""
    degrees = [f"{name} {plan.layout.degree(name)}" for name in ("tp", "dp_replicate") if plan.layout.degree(name) > 1]
    return " and ".join([plan.train.strategy, *degrees])


def described(plan: Plan) -> str:
    """``fsdp (45.7 GiB a GPU)``."""
    return f"{named(plan)} ({gib(memory_of(plan).total)} GiB a GPU)"


def gib(size: int) -> str:
    """Bytes in GiB, with one decimal; a comma never, since choices are joined by it."""
    return f"{size / GIB:.1f}"


def _smallest(question: Question, like: Plan) -> list[Plan]:
    """The run on the fewest GPUs that hold it without offloading; empty where the cluster has too few."""
    nodes, per_node = question.most
    counts = [(1, n) for n in _doubling(per_node)] + [(n, per_node) for n in _doubling(nodes) if n > 1]
    for count in counts:
        found = question.weighed(Way(AUTO, nodes=count[0], ranks_per_node=count[1]))
        if found := [plan for plan in found if fits(plan) and not STRATEGIES[plan.train.strategy].offload]:
            return [min(found, key=pace)]
    return []


def _doubling(most: int) -> list[int]:
    """1, 2, 4 … and ``most`` itself."""
    return sorted({most, *(2**n for n in range(most.bit_length()))})


def _with_adapters(question: Question, wanted: Way) -> list[Plan]:
    """The run with adapters in place of whole training, and with a base of four bits, as far as they fit here."""
    found = []
    here = Way(AUTO, nodes=wanted.nodes, ranks_per_node=wanted.ranks_per_node)
    for quantization in ("none", "nf4"):
        smaller = dataclasses.replace(question, draft=partial(_adapted, question.draft, quantization))
        found += sorted(filter(fits, smaller.weighed(here)), key=pace)[:1]
    return found


def _adapted(draft: Draft, quantization: str, way: Way) -> Plan:
    plan = draft(way)
    tuner = dataclasses.replace(plan.tuner, kind="lora")
    model = dataclasses.replace(plan.model, quantization=quantization, main_params_dtype="float32")
    return dataclasses.replace(plan, tuner=tuner, model=model)
