"""Models and datasets named by a hub's id: found and downloaded once, on the login side, and pinned in the Plan.

The ranks run offline and find what was downloaded in the same cache; a name without a pinned revision would mean
something else the day after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import Problem, Refusal, refuse
from hpcft.plan import hubfiles
from hpcft.plan.basefiles import read_config, unfit
from hpcft.plan.plan import DataPlan, ModelPlan, Plan, Source
from hpcft.run.expand import expanded, exported


@dataclass(frozen=True)
class Wanted:
    """What to download. kind: model or dataset; source: huggingface or modelscope; files: patterns."""

    name: str
    kind: str
    source: str
    revision: str | None
    files: tuple[str, ...]
    cache: str | None


@dataclass(frozen=True)
class Snapshot:
    """A downloaded revision. revision: its commit; on ModelScope, which does not tell it, the branch or tag."""

    folder: Path
    revision: str


def resolve(plan: Plan, environ: Mapping[str, str] | None = None) -> Plan:
    """``plan`` with every hub name downloaded and its revision pinned; a plan of local folders is returned as it is.

    Raises Refusal, for all names that cannot be had at once.
    """
    cache = cache_folder(plan, os.environ if environ is None else environ)
    problems: list[Problem] = []
    with _collected(problems):
        plan = dataclasses.replace(plan, model=_model(plan, cache))
    with _collected(problems):
        plan = dataclasses.replace(plan, data=_tokenizer(plan, cache))
    train, validation = (_datasets(split, cache, problems) for split in (plan.data.train, plan.data.validation))
    if problems:
        raise Refusal(list(dict.fromkeys(problems)))
    return dataclasses.replace(plan, data=dataclasses.replace(plan.data, train=train, validation=validation))


def cache_folder(plan: Plan, environ: Mapping[str, str]) -> str | None:
    """The cache that the ranks will read; None: the hub library's own default, here and there."""
    there = exported_home(plan, environ)
    if there.get("HF_HUB_CACHE"):
        return there["HF_HUB_CACHE"]
    return str(Path(there["HF_HOME"]) / "hub") if there.get("HF_HOME") else None


def exported_home(plan: Plan, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that say where hubs keep their files, as the job will have them."""
    homes = tuple(v for v in plan.environment if v.name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"))
    return exported(dataclasses.replace(plan, environment=homes), environ)


def config_folder(
    name: str, source: str, revision: str | None, home: str | None, environ: Mapping[str, str], fetch: bool
) -> Path | None:
    """Where a hub model's config.json is: in the cache that ``home`` (HF_HOME of the profile) or the environment names.

    fetch: ask the hub for that one small file where the cache has none. None where it is not there, and Refusal where
    it was to be fetched and cannot be.
    """
    try:
        cache = str(Path(expanded(home, environ, "hf_home")) / "hub") if home else None
    except Refusal:  # $SCRATCH and the like, on a machine where a plan is only looked at
        if fetch:
            raise
        return None
    if fetch:
        return download(Wanted(name, "model", source, revision, ("config.json",), cache)).folder
    if source != "huggingface":
        return None
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache, revision=revision)
    except errors.HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _model(plan: Plan, cache: str | None) -> ModelPlan:
    model = plan.model
    if model.source == "local":
        return model
    small = download(Wanted(model.path, "model", model.source, model.revision, ("config.json",), cache))
    # Before weights are downloaded that cannot be trained.
    config = read_config(small.folder) if (small.folder / "config.json").is_file() else {}
    keys = {
        "model": "model.model",
        "target_modules": "tuner.target_modules",
        "modules_to_save": "tuner.modules_to_save",
    }
    if problems := [(keys[leaf], problem) for leaf, some in unfit(config, plan).items() for problem in some]:
        raise Refusal([dataclasses.replace(problem, where=key) for key, problem in problems])
    files = hubfiles.model_files(not model.from_scratch, model.trust_remote_code)
    found = download(Wanted(model.path, "model", model.source, model.revision, files, cache))
    if not model.from_scratch and not any(found.folder.rglob("*.safetensors")):
        raise refuse(
            f"model {model.path} has no safetensors weights, and hpcft reads no pickles",
            where="model.model",
            hint="look for a revision converted to safetensors: hubs keep one as refs/pr/N for many old models",
        )
    return dataclasses.replace(model, revision=found.revision)


def _tokenizer(plan: Plan, cache: str | None) -> DataPlan:
    data, model = plan.data, plan.model
    if data.tokenizer_source == "local":
        return data
    if (data.tokenizer, data.tokenizer_source) == (model.path, model.source):
        return dataclasses.replace(data, tokenizer_revision=model.revision)
    files = hubfiles.model_files(False, data.trust_remote_code)
    wanted = Wanted(data.tokenizer, "model", data.tokenizer_source, data.tokenizer_revision, files, cache)
    return dataclasses.replace(data, tokenizer_revision=download(wanted).revision)


def _datasets(sources: Iterable[Source], cache: str | None, problems: list[Problem]) -> tuple[Source, ...]:
    found = []
    for source in sources:
        with _collected(problems):
            found.append(_dataset(source, cache))
    return tuple(found)


def _dataset(source: Source, cache: str | None) -> Source:
    if source.source == "local":
        return source
    wanted = Wanted(source.path, "dataset", source.source, source.revision, hubfiles.DATASET, cache)
    return dataclasses.replace(source, revision=download(wanted).revision)


def download(wanted: Wanted) -> Snapshot:
    """The snapshot, downloaded unless it is in the cache. Raises Refusal with a hint."""
    return _modelscope(wanted) if wanted.source == "modelscope" else _huggingface(wanted)


def _huggingface(wanted: Wanted) -> Snapshot:
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{'datasets/' if wanted.kind == 'dataset' else ''}{wanted.name}"
    hints: dict[type[Exception], str] = {  # the first that fits counts: some are kinds of others
        errors.GatedRepoError: f"accept its terms at {page}, then: hf auth login",
        errors.RepositoryNotFoundError: f"is it spelt as at {page}? For a private one: hf auth login",
        errors.RevisionNotFoundError: f"its branches, tags and commits: {page}/tree/main",
        errors.HFValidationError: "a hub name is OWNER/NAME; a folder here is named with ./ in front",
        errors.LocalEntryNotFoundError: "the hub cannot be reached and the cache does not have it; download it where "
        "there is a network into the same HF_HOME, or name a folder",
        errors.HfHubHTTPError: "the hub answered with an error; try again later",
        OSError: "look at the space and rights of HF_HOME",
    }
    try:
        folder = snapshot_download(
            wanted.name,
            repo_type=wanted.kind,
            revision=wanted.revision,
            allow_patterns=list(wanted.files),
            ignore_patterns=list(hubfiles.IGNORED),
            cache_dir=wanted.cache,
        )
    except tuple(hints) as error:
        hint = next(hint for kind, hint in hints.items() if isinstance(error, kind))
        raise _refused(wanted, "Hugging Face", error, hint) from error
    return Snapshot(Path(folder), Path(folder).name)


def _modelscope(wanted: Wanted) -> Snapshot:
    try:
        from modelscope.hub import snapshot_download as hub
    except ImportError as error:
        what = f"{wanted.kind} {wanted.name} is on ModelScope, whose package is not here"
        raise refuse(what, where=_key(wanted), hint="pip install modelscope") from error
    fetch: Any = hub.dataset_snapshot_download if wanted.kind == "dataset" else hub.snapshot_download
    try:
        folder = fetch(
            wanted.name,
            revision=wanted.revision,
            allow_patterns=list(wanted.files),
            ignore_patterns=list(hubfiles.IGNORED),
        )
    except Exception as error:  # its errors have no common base but this one
        raise _refused(wanted, "ModelScope", error, "is the name spelt as on modelscope.cn?") from error
    return Snapshot(Path(folder), wanted.revision or "master")


def _refused(wanted: Wanted, hub: str, error: Exception, hint: str) -> Refusal:
    words = str(error).strip().splitlines() or [""]
    at = f" at {wanted.revision}" if wanted.revision else ""
    return refuse(
        f"{wanted.kind} {wanted.name}{at} cannot be had from {hub}",
        where=_key(wanted),
        value=f"{type(error).__name__}: {words[0]}",
        hint=hint,
    )


def _key(wanted: Wanted) -> str:
    return "model.model" if wanted.kind == "model" else "data.dataset"


@contextlib.contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        problems.extend(refusal.problems)
