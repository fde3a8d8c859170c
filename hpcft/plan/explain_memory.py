"""Memory, time and strategy on the page of ``hpcft plan``: predictions with the arithmetic they come from."""

from __future__ import annotations

from hpcft.catalog import STRATEGIES
from hpcft.plan.auto import gib
from hpcft.plan.memory import gpu_parts, host_parts
from hpcft.plan.plan import Plan
from hpcft.plan.prediction import MemoryPlan, Option
from hpcft.plan.speed import StepTime, peak_of, step_flop, step_time
from hpcft.plan.ways import HEADROOM, host_overflows, host_unknown

BAR = 24  # characters for a whole GPU
NAME = 14  # columns of a part's name: the longest, and a space


def explain_memory(plan: Plan) -> list[tuple[str, str]]:
    """The lines about memory, and about how the strategy was chosen; none on CPUs and for shapes that are not known."""
    memory = plan.memory
    if memory is None:
        return []
    bars = [_bar(part.name, part.bytes, memory, part.arithmetic) for part in gpu_parts(plan, memory.shape)]
    lines = [_sum(memory), *bars, *_free(memory), *_host(plan, memory)]
    return [("memory", "\n".join(lines)), *_choice(plan, memory)]


def _sum(memory: MemoryPlan) -> str:
    card = memory.hardware.gpu_bytes
    of = f" of {gib(card)} ({memory.total / card:.0%})" if card else " (the GPU's own is not known)"
    close = ": close, and predictions err" if card and memory.total > HEADROOM * card else ""
    return f"predicted {gib(memory.total)} GiB a GPU{of}{close}"


def _bar(name: str, size: int, memory: MemoryPlan, text: str) -> str:
    """Name, GiB, a bar of BAR characters for the whole GPU, words."""
    whole = max(memory.hardware.gpu_bytes or 0, memory.total)
    bar = "#" * round(BAR * size / whole) or ("." if size else "")
    return f"{name:<{NAME}}{gib(size):>6}  {bar:<{BAR}}  {text}".rstrip()


def _free(memory: MemoryPlan) -> list[str]:
    left = (memory.hardware.gpu_bytes or 0) - memory.total
    return [_bar("free", left, memory, "")] if left > 0 else []


def _host(plan: Plan, memory: MemoryPlan) -> list[str]:
    node = memory.hardware.host_bytes
    parts = [f"{p.name} {gib(p.bytes)} ({p.arithmetic})" for p in host_parts(plan, memory.shape) if p.bytes]
    of = f" of {gib(node)}{', too little' if host_overflows(memory) else ''}" if node else ""
    return [f"and of a node's own memory {gib(memory.host)} GiB{of}: {', '.join(parts)}"]


def _choice(plan: Plan, memory: MemoryPlan) -> list[tuple[str, str]]:
    """The next cheaper way for a named strategy; for auto its reason and the runners-up."""
    if not memory.options:
        return []
    if not memory.reason:
        return [("cheaper", f"next is {option_words(memory.options[0], memory)}")]
    chosen, *rest = (option_words(option, memory) for option in memory.options)
    return [("strategy", "\n".join([f"auto: {chosen}; {memory.reason}", *(f"then {other}" for other in rest)]))]


def option_words(option: Option, memory: MemoryPlan) -> str:
    """``fsdp, tp 2: 45.7 GiB, 1.2 s a step``."""
    offloads = bool(STRATEGIES[option.strategy].offload)
    unknown = offloads and host_unknown(memory)
    degrees = [f"{name} {n}" for name, n in (("tp", option.tp), ("dp_replicate", option.dp_replicate)) if n > 1]
    said = [f"{gib(option.gpu_bytes)} GiB"]
    said += [f"{gib(option.host_bytes)} GiB of the node"] if offloads else []
    said += [f"{option.seconds:.2g} s a step"] if option.seconds else []
    said += [] if option.fits else ["node_memory is not known" if unknown else "does not fit"]
    return f"{', '.join([option.strategy, *degrees])}: {', '.join(said)}"


def explain_time(plan: Plan) -> tuple[float, str] | None:
    """Seconds of an optimizer step, and the words for them; None where the speed is not known."""
    time = step_time(plan, plan.memory.shape, plan.memory.hardware) if plan.memory else None
    return (time.total, _seconds(plan, time)) if time else None


def _seconds(plan: Plan, time: StepTime) -> str:
    assert plan.memory is not None
    share = sum(step_flop(plan, plan.memory.shape)) / (time.total * plan.layout.world_size * peak_of(plan))
    size = f"{plan.memory.shape.parameters / 1e9:.2f} B weights at {share:.0%} of the peak"
    beside = [f"{seconds:.2g} s of {what}" for seconds, what in
              ((time.exposed, "waiting for other GPUs"), (time.host, "the node's memory and cores"))
              if seconds >= 0.01 * time.total]  # fmt: skip
    return f"about {time.total:.2g} s an optimizer step ({size}{'; ' + ', '.join(beside) if beside else ''})"
