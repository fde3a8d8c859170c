"""Many runs in one script: a Slurm array whose elements have a Plan each, written as one Plan and a table.

The script holds the first run's Plan whole and, for every element, a line with the element's number, the fingerprint of
its Plan, and the keys in which the runs differ: a thousand runs are some two hundred kilobytes, a person can read which
run does what, and the file alone is all that the job needs. An element's number says which run it is, whatever Slurm
has done to it meanwhile: requeued, it comes back as itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.errors import refuse
from hpcft.plan.difference import differing_keys, fingerprint_of, text_with, value
from hpcft.plan.plan import Plan

_Piece = tuple[tuple[Plan, ...], tuple[str, ...], tuple[str, ...]]

ROW_BYTES = 24  # of a row's number and fingerprint
ROOM_BYTES = 64 * 1024  # of the largest script that Slurm takes, left to the script around the table


@dataclass(frozen=True)
class Array:
    """One array, element by element: plans, their canonical texts, and the lines of its table.

    at_once: most elements that run together.
    """

    name: str
    plans: tuple[Plan, ...]
    texts: tuple[str, ...]
    rows: tuple[str, ...]
    at_once: int | None = None

    @property
    def indices(self) -> str:
        """What ``--array`` is given."""
        return f"0-{len(self.plans) - 1}" + (f"%{self.at_once}" if self.at_once else "")


def arrays(
    name: str, plans: Sequence[Plan], most: int = 1001, script_bytes: int = 4 * 2**20, at_once: int | None = None
) -> list[Array]:
    """``plans`` as few arrays: runs that ask Slurm for the same share one, up to ``most`` elements or ``script_bytes``.

    Raises Refusal where a run's name is taken twice.
    """
    refuse_twice(plans)
    same: dict[object, list[Plan]] = {}
    for plan in plans:
        same.setdefault(_shared(plan), []).append(plan)
    return [Array(name, *piece, at_once) for group in same.values() for piece in _pieces(group, most, script_bytes)]


def refuse_twice(plans: Sequence[Plan]) -> None:
    """Raises Refusal where two have one folder: their jobs would wait for each other's lease, or take turns in it."""
    seen: set[tuple[str, str]] = set()
    for plan in plans:
        place = (plan.folders.runs, plan.name)
        if place in seen:
            raise refuse("name: two runs of a sweep have the same", value=plan.name, hint="give each its own")
        seen.add(place)


def element(text: str, number: str) -> str:
    """The canonical text of the Plan of element ``number``, from what the script holds: a Plan, then the table.

    Raises Refusal for an element that is not there, and for a line that does not give the Plan it was made from.
    """
    lines = text.split("\n")
    end = lines.index("}") if "}" in lines else len(lines)
    rows = {line.split(" ", 1)[0]: line for line in lines[end + 1 :] if line}
    if number not in rows:
        raise refuse("this array has no such element", value=number, choices=_range(rows))
    try:
        _, fingerprint, values = rows[number].split(" ", 2)
        found = text_with("\n".join(lines[: end + 1]), json.loads(values))
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"line {number} of the array's table is broken: {error}", hint="render the script anew") from error
    if fingerprint_of(found) != fingerprint:
        raise refuse(
            f"line {number} of the array's table gives plan {fingerprint_of(found)} and not {fingerprint}",
            hint="script or line were changed by hand, or are not whole: render the script anew",
        )
    return found


def _shared(plan: Plan) -> object:
    """What the script says once for all elements. The name of the job is the array's."""
    return dataclasses.replace(plan.resources, job_name=""), plan.environment, plan.folders, plan.hpcft


def _keys(data: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which any run differs from the first, each shown for all of them; in the order of the Plan."""
    found = {key for one in data for key in differing_keys(one, data[0])}
    # Where a whole section is missing in one run, the others' is one value too.
    whole = [key for key in found if not any(key.startswith(f"{other}.") for other in found)]
    return sorted(whole, key=lambda key: _position(data[0], key))


def _position(data: Mapping[str, Any], key: str) -> list[int]:
    name, dot, rest = key.partition(".")
    return [list(data).index(name), *(_position(data[name], rest) if dot else ())]


def _pieces(group: Sequence[Plan], most: int, script_bytes: int) -> Iterator[_Piece]:
    """Plans that ask Slurm for the same, as many at a time as one script takes."""
    data = [dataclasses.asdict(plan) for plan in group]
    keys = _keys(data)
    values = [{key: value(one, key) for key in keys} for one in data]
    room = script_bytes - ROOM_BYTES - len(group[0].to_json())
    first, used = 0, 0
    for number, one in enumerate(values):
        size = len(json.dumps(one, ensure_ascii=False).encode(errors="surrogatepass")) + ROW_BYTES
        if number > first and (number - first >= most or used + size > room):
            yield _piece(group[first:number], values[first:number])
            first, used = number, 0
        used += size
    yield _piece(group[first:], values[first:])


def _piece(plans: Sequence[Plan], values: Sequence[Mapping[str, Any]]) -> _Piece:
    whole = plans[0].to_json()
    texts = tuple(text_with(whole, row) for row in values)
    rows = (
        f"{number} {fingerprint_of(text)} {json.dumps(row, ensure_ascii=False)}"
        for number, (text, row) in enumerate(zip(texts, values, strict=True))
    )
    return tuple(plans), texts, tuple(rows)


def _range(rows: Mapping[str, str]) -> list[str]:
    return [f"0 to {len(rows) - 1}"] if rows else []
