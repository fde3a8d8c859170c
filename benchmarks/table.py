"""Rows of results.jsonl as Markdown: everything that is reckoned is reckoned here, so old results can be shown anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import device, kernels
from benchmarks.cases import EVERY, LIKE_THEM, OTHER_NUMBERS
from benchmarks.numbers import COMPARED, OF_PAIRS, SAME, disagreement, mfu, percentile, roofline_speed
from benchmarks.task import PROFILED

Record = Mapping[str, Any]
GIB = 2**30
COLUMNS = (
    "case", "who", "GPUs", "rows a forward", "loss", "step median, p95 (steps)", "tokens/s/GPU (trained)",
    "MFU causal (matrices)", "of the roofline", "peak, reserved GiB", "first step", "SM clock, power", "ours ÷ it",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def speed(record: Record) -> float:
    """Tokens/s of one GPU in the timed window."""
    return float(record["tokens"] * record["timed"] / record["wall"] / record["gpus"])


def counted(record: Record, records: Sequence[Record]) -> str:
    """Why the time of a row does not count; "" when it does."""
    if "failed" in record:
        return str(record["failed"])
    first = reference(record, records)
    if first is None:
        return "no run of ours to compare losses with"
    if first is record:
        return ""
    tolerance = OF_PAIRS if EVERY[record["case"]].pairs else SAME
    return disagreement((first["losses"], first["norms"]), (record["losses"], record["norms"]), tolerance)


def reference(record: Record, records: Sequence[Record]) -> Record | None:
    """The run whose losses all others of the same case and number of GPUs are compared with."""
    same = [r for r in records if (r["case"], r["gpus"], r["run"]) == (record["case"], record["gpus"], record["run"])]
    return next((r for r in same if r["ours"] and "failed" not in r), None)


def best(record: Record, records: Sequence[Record]) -> Record | None:
    """The fastest of ours on the same case and GPUs in the row's precision, among those that count."""
    like = LIKE_THEM.get(record["contestant"])
    own = [
        r for r in records
        if r["ours"] and (r["case"], r["gpus"], r["run"]) == (record["case"], record["gpus"], record["run"])
        and (r["contestant"] == like if like else r["contestant"] not in OTHER_NUMBERS) and not counted(r, records)
    ]  # fmt: skip
    return max(own, key=speed, default=None)


def row(record: Record, records: Sequence[Record]) -> str:
    """One row; records: all of its run so far, for the comparison."""
    case, who = EVERY[record["case"]], record["contestant"]
    head = [record["case"], who, str(record["gpus"])]
    why = counted(record, records)
    if "failed" in record:
        return "| " + " | ".join([*head, f"did not run: {clean(why)}", *[""] * (len(COLUMNS) - 4)]) + " |"
    work, gpu, rate = case.work(record["gpus"], record["lengths"], record["trained"]), record["gpu"], speed(record)
    whole, matrices = mfu(work, rate, gpu), mfu(work, rate, gpu, attention=False)
    ours = best(record, records)
    ratio = "" if record["ours"] else "–" if why or ours is None else f"**{speed(ours) / rate:.2f}**"
    pairs = f"; {rate * record['gpus'] / case.length * case.documents / 2:.1f} pairs/s" if case.pairs else ""
    step = record["seconds"]
    cells = [
        str(record["micro"]),
        f"{record['losses'][0]:.4f} → {record['losses'][:COMPARED][-1]:.4f}" + (f"; **differs**: {why}" if why else ""),
        f"{median(step):.3f} s, {percentile(step, 0.95):.3f} s ({record['timed']})",
        f"{rate:,.0f} ({rate * record['trained']:,.0f}{pairs})" + (" **does not count**" if why else ""),
        f"{whole:.1%} ({matrices:.1%})" if whole is not None and matrices is not None else "–",
        f"{rate / roofline_speed(work, gpu):.2f}" if whole is not None else "–",
        f"{record['peak'] / GIB:.1f}, {record['reserved'] / GIB:.1f}" if record["peak"] else "–",
        f"{record['first_step']:.1f} s",
        f"{record['clock']:.0f} MHz, {record.get('power', 0):.0f} W" if "clock" in record else "–",
        ratio,
    ]
    return "| " + " | ".join([*head, *cells]) + " |"


def clean(text: str) -> str:
    """The last line of a log without the paths of the machine, short enough for a cell."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if re.match(r"\s*[\w.]*(Error|Exception|Refusal)\b", line)), "")
    line = (said or (lines[-1] if lines else "")).strip()
    if "out of memory" in text.lower():
        line = "out of memory"
    return re.sub(r"(?:/[\w.+-]+){2,}", lambda m: m.group().rpartition("/")[2], line).replace("|", "/")[:140]


def scaling(records: Sequence[Record]) -> list[str]:
    """What several GPUs give of one GPU's speed, each; a line for every contestant that ran on both."""
    lines = []
    for record in records:
        one = next(
            (r for r in records if r["gpus"] == 1 and "failed" not in r
             and (r["case"], r["contestant"]) == (record["case"], record["contestant"])), None,
        )  # fmt: skip
        if one is None or record["gpus"] == 1 or "failed" in record:
            continue
        share = speed(record) / speed(one)
        lines.append(f"{record['case']}, {record['contestant']}: {record['gpus']} GPUs, each {share:.3f} of one alone.")
    return lines


def report(records: Sequence[Record]) -> str:
    """The whole table of one run, with what it was measured on and the profiles."""
    rows = [row(r, records) for r in records]
    return "\n".join([f"{device.said(records[0]['setting'])}.", "", HEAD, *rows]) + "\n" + beside(records)


def beside(records: Sequence[Record]) -> str:
    """What stands below the rows: several GPUs against one, profiles, who is who."""
    parts: list[str] = []
    if lines := scaling(records):
        parts += ["", *lines]
    for record in records:
        if record.get("kernels"):
            title = f"Where a step's time goes: {record['case']}, {record['contestant']}, {record['gpus']} GPU"
            parts += ["", f"{title} (profiler on)", "", kernels.table(record["kernels"], PROFILED)]
    about = dict.fromkeys((r["contestant"], r["about"]) for r in records)
    parts += ["", *(f"- `{name}`: {text}" for name, text in about)]
    return "\n".join(parts) + "\n"


def section(records: Sequence[Record]) -> str:
    """A dated section for docs/benchmarks.md with the command that repeats it."""
    first = records[0]
    when, name = first["run"][:10], first["setting"]["device"]
    return f"\n## Speed, {when}, {name}\n\n```\n{first['command']}\n```\n\n{report(records)}"
