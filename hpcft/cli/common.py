"""What several verbs share: the words of a run, and the Plan that comes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from hpcft.config.cluster import ClusterProfile
    from hpcft.config.load import Loaded
    from hpcft.errors import Problem
    from hpcft.plan.plan import Plan
    from hpcft.run.paths import RunPaths

F = TypeVar("F", bound=Callable[..., Any])

# A run is described by a YAML file and any of its keys; click passes on what is no option of the verb itself.
RUN_WORDS: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": True}
RUN_EPILOG = "RUN is a YAML file and any key of it: --learning_rate 1e-4, train.learning_rate=1e-4, --dataset a b."


def run_words(function: F) -> F:
    """The argument that takes a YAML file and overrides."""
    return click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RUN.yaml] [--key value]…")(function)


@dataclass(frozen=True)
class Planned:
    """A run from its words to its Plan."""

    loaded: Loaded
    cluster: ClusterProfile
    cluster_file: str
    plan: Plan

    @property
    def chosen(self) -> Mapping[str, tuple[str, str]]:
        """Leaf → (value, origin) of everything that is not a default."""
        return {leaf: said for leaf, said in self.settings.items() if said[1] != "default"}

    @property
    def settings(self) -> Mapping[str, tuple[str, str]]:
        """Leaf → (value, origin) of every key."""
        from hpcft.config.leaves import leaf_sections

        values = {}
        for leaf, section in leaf_sections().items():
            value = getattr(getattr(self.loaded.run, section) if section else self.loaded.run, leaf)
            values[leaf] = (_spoken(leaf, value), self.loaded.origins[leaf])
        return values


def _spoken(leaf: str, value: Any) -> str:
    """A value as a person would write it."""
    from hpcft.clock import clock
    from hpcft.config.source import spoken

    if leaf == "time" and value is not None:
        return clock(value)
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else spoken(value)


def plan_run(words: Sequence[str], hub: str = "never") -> Planned:
    """Read the run and its cluster, decide; notes about words that have no effect go to stderr. Raises Refusal.

    hub: where the shape of a hub's model may be looked up: "never", so that the same files give the same Plan on every
    machine; in the "cache"; or "fetch", which asks the hub for its config.json.
    """
    from hpcft.config.load import load_cluster, load_run
    from hpcft.plan.advice import notes
    from hpcft.plan.make import make_plan
    from hpcft.plan.shape import read_shape

    loaded = load_run(words)
    if loaded.run.name is None and loaded.file is not None and loaded.file.stem not in ("run", "hpcft"):
        loaded = _named_by_file(loaded)
    for note in loaded.notes:
        click.echo(f"note: {note}", err=True)
    cluster, shown = load_cluster(loaded.run.cluster, loaded.file, loaded.origins["cluster"])
    with placed(loaded.origins):
        folder = _model_folder(loaded, cluster, hub)
    shape = read_shape(folder) if folder else None
    plan = make_plan(loaded.run, cluster, loaded.origins, shape)
    _refuse_other_models(plan, folder, loaded.origins)
    for note in notes(plan, shape):
        click.echo(f"note: {note}", err=True)
    return Planned(loaded, cluster, shown, plan)


def pinned(planned: Planned) -> Plan:
    """The plan with its hub names downloaded and pinned. Raises Refusal, with the lines of those that cannot be had."""
    from hpcft.launch.hub import resolve

    with placed(planned.loaded.origins):
        return resolve(planned.plan)


@contextlib.contextmanager
def placed(origins: Mapping[str, str]) -> Iterator[None]:
    """What is refused inside for a key is told with the line that the key is on, or that it is on the command line."""
    from hpcft.errors import Refusal

    def with_line(problem: Problem) -> Problem:
        origin = origins.get(problem.where.rpartition(".")[2], "default")
        return problem if origin == "default" else dataclasses.replace(problem, where=origin)

    try:
        yield
    except Refusal as refusal:
        raise Refusal([with_line(problem) for problem in refusal.problems]) from refusal


def _model_folder(loaded: Loaded, cluster: ClusterProfile, hub: str) -> str | None:
    """The folder of the run's model, where it can be known."""
    import os

    from hpcft.plan.checks import home
    from hpcft.plan.make import source_of

    model = loaded.run.model
    source = source_of(model.model, model.use_hf)
    if source == "local":
        return model.model
    if hub == "never":
        return None
    from hpcft.launch.hub import config_folder

    # A named strategy runs without the prediction; only what is to be chosen is worth a question to the hub.
    fetch = hub == "fetch" and loaded.run.parallel.strategy == "auto"
    hf_home = cluster.hf_home and home(cluster.hf_home)
    folder = config_folder(model.model, source, model.revision, hf_home, os.environ, fetch)
    return str(folder) if folder else None


def _refuse_other_models(plan: Plan, folder: str | None, origins: Mapping[str, str]) -> None:
    """Raises Refusal for a model whose config.json tells that it is not trained here, or not as the run says."""
    if folder is None or folder.startswith(("~", "$")):  # as ``read_shape``: whose home it is must not matter
        return
    from hpcft.plan.basefiles import read_config, unfit

    try:
        config = read_config(Path(folder))
    except OSError:  # a plan is made where the model is not, too
        return
    _refuse(unfit(config, plan), origins)


def refuse_absent_weights(plan: Plan, origins: Mapping[str, str]) -> None:
    """Raises Refusal where the model's folder is on this machine, and its weights are not there, or not whole."""
    import os

    from hpcft.plan.basefiles import unusable

    folder = Path(plan.model.path).expanduser()
    if plan.model.source == "local" and os.path.isdir(folder):
        _refuse({"model": unusable(folder, plan)}, origins)


def _refuse(found: Mapping[str, Sequence[Problem]], origins: Mapping[str, str]) -> None:
    """found: leaf → what is wrong with it. Raises Refusal with the lines of the leaves."""
    from hpcft.errors import Refusal

    if problems := [
        dataclasses.replace(problem, where=origins.get(leaf, "")) for leaf, some in found.items() for problem in some
    ]:
        raise Refusal(problems)


def _named_by_file(loaded: Loaded) -> Loaded:
    import re

    assert loaded.file is not None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", loaded.file.stem).strip("-._")[:64]
    return dataclasses.replace(loaded, run=loaded.run.model_copy(update={"name": name or None}))


def refuse_missing_files(plan: Plan, origins: Mapping[str, str], ranks: bool = False) -> None:
    """Raises Refusal for every local model, data file or chat template that is not there or cannot be used.

    origins: leaf → the line it is on; empty where only the Plan is left of the run's file. ranks: what they read too.
    """
    from hpcft.config.source import is_file
    from hpcft.errors import Refusal
    from hpcft.launch.inputs import missing_inputs, no_such_file

    problems = missing_inputs(plan, origins, ranks)
    template = plan.data.chat_template or ""
    if ("/" in template or "." in template) and not is_file(Path(template).expanduser()):
        problems.append(no_such_file("chat_template", template, origins.get("chat_template", ""), (".jinja",)))
    if problems:
        raise Refusal(problems)


def find_run(name: str) -> RunPaths:
    """The run called ``name``: a run folder, or a name under runs/. Raises Refusal where there is none."""
    from hpcft.errors import near, refuse
    from hpcft.run.folder import is_closed, is_run
    from hpcft.run.paths import RunPaths

    for folder in (Path(name), Path("runs") / name):
        if is_run(folder):
            return RunPaths(folder.absolute())
        if is_closed(folder):
            raise refuse("the folder is closed to you", where=str(folder), hint="a run is its owner's: ask them")
    known = sorted(path.name for path in Path("runs").glob("[!.]*") if is_run(path))
    guess = _elsewhere(name) or near(name, known)
    hint = f"did you mean {guess}?" if guess else "give the run's folder, or call this from where it was submitted"
    raise refuse("no such run", value=name, choices=known[:12], hint=hint)


def _elsewhere(name: str) -> str:
    """The run of that name in another folder of this one than runs/: output_dir of its file."""
    import glob

    from hpcft.run.folder import is_run

    there = sorted(Path().glob(f"*/{glob.escape(name)}")) if name and "/" not in name else []
    return next((str(path) for path in there if is_run(path)), "")


def spelt(run: Path) -> str:
    """The run in ``run`` as find_run finds it from here: its name, where it is under runs/, else its folder."""
    import shlex

    here = Path.cwd()
    folder = run.relative_to(here) if run.is_relative_to(here) else run
    return shlex.quote(folder.name if folder.parent == Path("runs") else str(folder))
