"""Where the time of a step goes on the device: kernels by what they do, and the gaps between them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

OPTIMIZER = "optimizer step"  # the name under which its kernels are recorded
# The first that matches a kernel's name, or on a CPU an operation's, is its group.
GROUPS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|c10d|gloo|memcpy ptop"),
    ("CE", r"log_?softmax|cunn_softmax|nll_loss|cross_entropy|crossentropy|logsumexp"),
    ("elementwise", r"triton_(poi|red|per)_"),  # compiled blocks, whatever they were fused of
    ("attention", r"flash|fmha|scaled_dot_product|attention"),
    ("optimizer", r"multi_tensor_apply|adam|foreach|clip_grad"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|linear|splitk|\b(add|b)?mm\b|_mm_|_mm$"),
    ("copies and casts", r"memcpy|memset|copy_"),
)
OTHER = "elementwise"
ORDER = ("GEMM", "attention", "elementwise", "CE", "optimizer", "communication", "copies and casts", "idle")


class Kernel(NamedTuple):
    """One thing that ran on the device. start, end: in the profiler's own seconds."""

    name: str
    start: float
    end: float


def group_of(name: str) -> str:
    """Of a kernel's name; elementwise is what no other group claims: norms, gates, rotations, casts, sums."""
    return next((group for group, words in GROUPS if re.search(words, name, re.IGNORECASE)), OTHER)


def shares(kernels: Iterable[Kernel], spans: Iterable[Kernel], wall: float) -> dict[str, float]:
    """Seconds of each group. spans: where the device was in the optimizer step. wall: seconds in all.

    Communication counts where nothing else runs beside it, and idle is when nothing runs at all.
    """
    found, ends = Counter[str](), [(span.start, span.end) for span in spans]
    own: list[tuple[float, float]] = []
    messages: list[tuple[float, float]] = []
    for kernel in kernels:
        group = group_of(kernel.name)
        if group == "communication":
            messages.append((kernel.start, kernel.end))
            continue
        if any(start <= kernel.start <= end for start, end in ends):
            group = "optimizer"
        found[group] += kernel.end - kernel.start
        own.append((kernel.start, kernel.end))
    computing, busy = covered(own), covered([*own, *messages])
    overlap = sum(end - start for start, end in own) - computing  # of streams beside each other: nobody's twice
    if overlap > 0:
        scale = computing / (computing + overlap)
        found = Counter({group: seconds * scale for group, seconds in found.items()})
    return {**found, "communication": busy - computing, "idle": max(0.0, wall - busy)}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of their union."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def gaps(kernels: Iterable[Kernel], most: int = 12) -> list[tuple[str, str, int, float]]:
    """Where nothing runs: after which kernel, before which, how often, and seconds in all; the longest in all first."""
    seconds, often = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    last: Kernel | None = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if last is not None and kernel.start > last.end:
            seconds[last.name, kernel.name] += kernel.start - last.end
            often[last.name, kernel.name] += 1
        if last is None or kernel.end > last.end:
            last = kernel
    return [(*between, often[between], time) for between, time in seconds.most_common(most)]


class Profile:
    """What was found while the block ran; ``groups`` after it."""

    def __init__(self) -> None:
        self.recorded: Any = None
        self.wall = 0.0

    def longest(self, most: int = 25) -> list[tuple[str, int, float]]:
        """Name, how often, and seconds in all of the kernels that take longest; [] on a CPU."""
        seconds, often = Counter[str](), Counter[str]()
        for kernel in self.on_device()[0]:
            seconds[kernel.name] += kernel.end - kernel.start
            often[kernel.name] += 1
        return [(name, often[name], time) for name, time in seconds.most_common(most)]

    def on_device(self) -> tuple[list[Kernel], list[Kernel]]:
        """The device's kernels, and the spans in which it was in the optimizer step; none on a CPU."""
        from torch.autograd import DeviceType

        kernels, spans = [], []
        for event in self.recorded.events():
            if event.device_type != DeviceType.CUDA:
                continue
            kernel = Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
            if event.name == OPTIMIZER:
                spans.append(kernel)
            elif not getattr(event, "is_user_annotation", False):
                kernels.append(kernel)
        return kernels, spans

    def groups(self) -> dict[str, float]:
        """Seconds by group. On a CPU by operations, of the thread that ran them, which is a rehearsal and no more."""
        kernels, spans = self.on_device()
        if kernels:
            return shares(kernels, spans, self.wall)
        found = Counter[str]()
        for event in self.recorded.events():
            named = event.name == OPTIMIZER or _inside(event)
            found["optimizer" if named else group_of(event.name)] += event.self_cpu_time_total / 1e6
        return {**found, "idle": max(0.0, self.wall - sum(found.values()))}


def _inside(event: Any) -> bool:
    while event is not None:
        if event.name == OPTIMIZER:
            return True
        event = event.cpu_parent
    return False


@contextmanager
def profiling(device: str) -> Iterator[Profile]:
    """Record the block, the device waited for at both ends."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    found = Profile()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    with profile(activities=activities) as recorded:
        began = time.perf_counter()
        yield found
        wait()
        found.wall = time.perf_counter() - began
    found.recorded = recorded


def table(groups: Mapping[str, float], steps: int) -> str:
    """Markdown: milliseconds of a step and share of it, the profiler's own cost included."""
    whole = sum(groups.values())
    lines = ["| group | ms a step | share |", "| --- | --- | --- |"]
    for name in ORDER:
        seconds = groups.get(name, 0.0)
        lines.append(f"| {name} | {seconds / steps * 1e3:.1f} | {seconds / max(whole, 1e-9):.1%} |")
    return "\n".join(lines)
