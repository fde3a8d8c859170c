"""What a person means to export: which run, which of its checkpoints, in which form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import refuse
from hpcft.plan.plan import Plan
from hpcft.run import manifest as manifests
from hpcft.run.manifest import Broken, Manifest
from hpcft.run.paths import RunPaths

ADAPTER, MODEL, MERGED = "adapter", "model", "merged"  # the kinds of an export

Say = Callable[[str], None]


@dataclass(frozen=True)
class Identity:
    """What makes two exports the same one. state: the SHA-256 of the checkpoint's manifest, hence of all its bytes."""

    kind: str
    dtype: str
    step: int
    state: str

    @classmethod
    def of(cls, kind: str, dtype: str, manifest: Manifest) -> Identity:
        return cls(kind, dtype, manifest.step, manifests.checksum(manifest.folder / manifests.FILE))


def choose(paths: RunPaths, plan: Plan, words: str, fallback: bool, say: Say) -> Manifest:
    """The checkpoint that ``words`` ask for, every byte of it verified.

    words: latest, best, a step or a folder; "" for best where the plan keeps one, else latest. fallback: take an
    earlier whole one where that is broken.

    Raises Refusal where there is none, or it is broken and no earlier one may be taken.
    """
    folder = _asked(paths, plan, words)
    try:
        return manifests.verify(folder)
    except Broken as broken:
        if not folder.exists() and _asked(paths, plan, words) != folder:  # a run that goes on keeps only its newest
            return choose(paths, plan, words, fallback, say)
        say(f"broken: {broken}")
        reason = broken
    step = next((step for step, other in manifests.folders(paths) if other == folder), 0)
    found = next((manifest for manifest in manifests.verified(paths) if manifest.step < step), None)
    if fallback and found is not None:
        say(f"WARNING: {folder.name} is broken; taking {found.folder.name} instead")
        return found
    hint = (
        f"the newest whole one before it is {found.folder.name}: --fallback takes it"
        if found
        else "no earlier one is whole"
    )
    raise refuse(f"{folder.name} is broken: {reason.why}", where=str(reason.file), hint=hint)


def _asked(paths: RunPaths, plan: Plan, words: str) -> Path:
    """The folder that ``words`` name. Raises Refusal with the checkpoints that are there."""
    there = manifests.folders(paths)
    best = manifests.pointed(paths.best)
    if not words:
        words = "best" if plan.checkpoint.load_best_at_end and best else "latest"
    if words == "latest" and there:
        return there[0][1]
    if words == "best" and best:
        return best
    if words.isdecimal() and paths.checkpoint(int(words)).is_dir():
        return paths.checkpoint(int(words))
    if not words.isdecimal() and words not in ("latest", "best") and Path(words).is_dir():
        return Path(words).absolute()
    choices = ["latest", *(["best"] if best else []), *(str(step) for step, _ in there)] if there else []
    what = "the run has no such checkpoint" if there else "the run has no checkpoint yet"
    hint = "a step, a checkpoint's folder, or one of these" if there else "it saves by save_steps and at its end"
    raise refuse(what, where=str(paths.checkpoints), value=words, choices=choices, hint=hint)


def kind_of(plan: Plan, merge: bool) -> str:
    """adapter, model or merged. Raises Refusal where the run has nothing of the kind."""
    if plan.tuner.kind == "full":
        if merge:
            raise refuse("--merge: this run trained every weight, so there is no adapter to merge", value=plan.name,
                         hint="leave --merge away: the export is the whole model")  # fmt: skip
        return MODEL
    if plan.only_merged and not merge:
        raise refuse("the adapter's base has random weights that are written nowhere, so it could be loaded by nobody",
                     value=plan.model.path, hint="export the whole model: --merge")  # fmt: skip
    return MERGED if merge else ADAPTER


def check_base(plan: Plan, paths: RunPaths) -> None:
    """Raises Refusal where a local base is not seen from here: is this where submit was typed?"""
    base = Path(plan.model.path)
    if plan.model.source != "local" or base.is_dir():
        return
    up = len(Path(plan.folders.runs).parts)
    submitted = next(iter(paths.root.parents[up : up + 1]), paths.root)
    there = not base.is_absolute() and (submitted / base).is_dir()
    raise refuse(
        "the base model's folder is not seen from this directory",
        where="model",
        value=plan.model.path,
        hint=f"type the same after: cd {submitted}" if there else "restore it, or link it to where the plan has it",
    )
