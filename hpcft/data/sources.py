"""From the names of datasets and tokenizers to files on this machine; nothing is downloaded here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpcft.data.files import READERS, kind_by_name
from hpcft.errors import Refusal, refuse
from hpcft.plan import hubfiles
from hpcft.plan.plan import Source

# Names that hubs give splits → the words by which a file or folder shows that it belongs to one.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


DEFAULT = "default"  # the subset of a dataset that names none, as hubs call it


@dataclass(frozen=True)
class DataFile:
    """One file to read. shown: its path as a person would write it. pinned: of a hub revision, so it cannot change."""

    path: Path
    shown: str
    pinned: bool = False


def data_files(source: Source) -> list[DataFile]:
    """The files of ``source`` in a fixed order. Raises Refusal where there are none."""
    if source.source == "local":
        return [DataFile(Path(source.path).expanduser(), source.path)]
    folder = snapshot(source.path, source.source, source.revision, "dataset")
    chosen = _declared(folder, source) or _by_name(folder, source)
    if not chosen:
        there = [str(path.relative_to(folder)) for path in _all_data(folder)]
        raise refuse(
            f"dataset {source.path} has no data files for split {source.split}"
            + (f" of subset {source.subset}" if source.subset else ""),
            value=", ".join(there) or "no JSON, JSONL, CSV or Parquet file at all",
            choices=sorted({split for name in there if (split := _split_of(name))}),
        )
    return [DataFile(path, f"{source.path}/{path.relative_to(folder)}", pinned=True) for path in chosen]


def snapshot(name: str, hub: str, revision: str | None, kind: str, code: bool = False) -> Path:
    """The local folder of a hub's dataset or model that was downloaded on the login side. Raises Refusal.

    code: a model's own Python files were downloaded too.
    """
    files = hubfiles.DATASET if kind == "dataset" else hubfiles.model_files(False, code)
    patterns = {"allow_patterns": list(files), "ignore_patterns": list(hubfiles.IGNORED)}
    look = _modelscope if hub == "modelscope" else _huggingface
    try:
        return Path(look(name, kind)(name, revision=revision, local_files_only=True, **patterns))
    except Refusal:
        raise
    except Exception as error:  # each hub has its own family of errors, all of which mean: not here
        raise refuse(
            f"{kind} {name} of {hub} is not on this machine",
            value=f"revision {revision or 'latest'}: {type(error).__name__}",
            hint="hpcft submit downloads it on the login side; offline, name a folder or file instead",
        ) from error


def _huggingface(name: str, kind: str) -> Callable[..., str]:
    from huggingface_hub import snapshot_download

    return partial(snapshot_download, repo_type=kind)


def _modelscope(name: str, kind: str) -> Callable[..., str]:
    try:
        from modelscope.hub import snapshot_download as hub
    except ImportError as error:
        raise refuse(f"{kind} {name} is on ModelScope", hint="pip install modelscope") from error
    fetch: Callable[..., str] = hub.dataset_snapshot_download if kind == "dataset" else hub.snapshot_download
    return fetch


def _declared(folder: Path, source: Source) -> list[Path]:
    """The files that the dataset's card declares for the subset and split, if it declares any."""
    there = {str(config.get("config_name") or DEFAULT): config for config in _configs(folder)}
    files = {name: _matching(folder, config, source.split) for name, config in there.items()}
    if source.subset:
        return files.get(source.subset, [])
    if default := next((name for name, config in there.items() if config.get("default") is True), None):
        return files[default]
    named = [name for name, found in files.items() if found]
    if DEFAULT in named or len(named) < 2:
        return files[DEFAULT if DEFAULT in named else named[0]] if named else []
    raise refuse(
        f"dataset {source.path} has several subsets, and its card says of none that it is the default",
        value=source.path,
        choices=named,
        hint=f"name one, or several as datasets: {source.path}:{named[0]}",
    )


def _matching(folder: Path, config: dict[str, Any], split: str) -> list[Path]:
    patterns = _patterns(config.get("data_files"), split)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _configs(folder: Path) -> list[dict[str, Any]]:
    card = folder / "README.md"
    if not card.is_file():
        return []
    from huggingface_hub.repocard import metadata_load

    try:
        configs = (metadata_load(card) or {}).get("configs") or []
    except Exception:  # a card nobody can parse declares nothing
        return []
    return [config for config in configs if isinstance(config, dict)]


def _patterns(declared: Any, split: str) -> list[str]:
    if isinstance(declared, str):
        return [declared] if split == "train" else []
    entries = declared if isinstance(declared, list) else []
    if all(isinstance(entry, str) for entry in entries):
        return list(entries) if split == "train" else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict) and entry.get("split") == split]
    return [pattern for path in paths for pattern in (path if isinstance(path, list) else [path]) if pattern]


def _by_name(folder: Path, source: Source) -> list[Path]:
    """The files whose names speak of the split; when no name speaks of any split, all files are the train split."""
    files = _all_data(folder)
    if source.subset:
        files = [path for path in files if source.subset in path.relative_to(folder).parts] or [
            path for path in files if path.name.startswith(source.subset)
        ]
    spoken = {path: _split_of(str(path.relative_to(folder))) for path in files}
    if not any(spoken.values()):
        return files if source.split == "train" else []
    return [path for path in files if spoken[path] == _canonical(source.split)]


def _all_data(folder: Path) -> list[Path]:
    kept = (path for path in folder.rglob("*") if kind_by_name(path) in READERS and path.is_file())
    named = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
    return sorted(path for path in kept if path.name not in named)


def _split_of(name: str) -> str:
    """The split that a path speaks of, the last word of it first, or an empty string."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if split := next((split for split, words in SPLITS.items() if word in words), ""):
            return split
    return ""


def _canonical(split: str) -> str:
    return next((name for name, words in SPLITS.items() if split in words), split)
