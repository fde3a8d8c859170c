"""Datasets written as maps, as axolotl and TRL write them, in our one-line form ``path:subset#rows``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.errors import near, refuse

_PATH = ("path", "dataset", "dataset_name", "file")
_SUBSET = ("subset", "subset_name", "name", "config", "dataset_config")
_ROWS = ("rows", "num_samples", "max_samples")
# The shape of a record is found by its keys, the kind of a file by its ending: what a map says of them adds nothing.
_FOUND = ("type", "ds_type", "conversation")


def dataset_words(value: Any) -> Any:
    """``value`` with each map as one line of text; anything else comes back as it is.

    Raises Refusal for a map without a path and for keys that would change what is read.
    """
    if isinstance(value, Mapping):
        return [_line(value)]
    if isinstance(value, (list, tuple)):
        return [_line(item) if isinstance(item, Mapping) else item for item in value]
    return value


def _line(entry: Mapping[str, Any]) -> str:
    said = {key: value for key, value in entry.items() if value not in (None, "")}
    path = _one_of(said, _PATH, entry)
    subset, rows = _one_of(said, _SUBSET, entry), _one_of(said, _ROWS, entry)
    for key in _FOUND:
        if isinstance(said.get(key), str):
            said.pop(key)
    if said.get("split") == "train":
        said.pop("split")
    if path is None or said:
        key = next(iter(said), "path")
        what = "a dataset needs a path" if path is None else f"a dataset has no {key} here"
        guess = near(key, (*_PATH, *_SUBSET, *_ROWS)) if path is not None else ""
        hint = f"did you mean {guess}?" if guess else "write path:subset#rows, for example a.jsonl#500"
        if key == "data_files":
            hint = "name the files themselves, each as a dataset of its own"
        raise refuse(what, value=dict(entry), choices=("path", "subset", "rows"), hint=hint)
    return f"{path}{f':{subset}' if subset else ''}{'' if rows is None else f'#{rows}'}"


def _one_of(said: dict[str, Any], names: tuple[str, ...], entry: Mapping[str, Any]) -> Any:
    """The value of the one of ``names`` that is there, taken out of ``said``. Raises Refusal where several are."""
    there = [name for name in names if name in said]
    if len(there) > 1:
        raise refuse(f"a dataset's {there[0]} and {there[1]} are the same", value=dict(entry), hint="remove one")
    return said.pop(there[0]) if there else None
