"""``hpcft init``: a run and a cluster profile to start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

SCHEMA_LINE = "# yaml-language-server: $schema={}.schema.json\n"


@click.command("init")
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@click.option("--run", "run", metavar="NAME", help="Which starter: lora, full, tiny; default: lora.")
@click.option("--cluster", metavar="NAME", help="Profile to start from; none: this machine, without Slurm.")
@click.option("--schema", "with_schema", is_flag=True, help="Also write JSON schemas for editors.")
@click.option("--list", "list_keys", is_flag=True, help="Print every key of a run and stop.")
def command(folder: Path, run: str | None, cluster: str | None, with_schema: bool, list_keys: bool) -> None:
    """Write run.yaml and cluster.yaml into FOLDER, a comment over every key; the run fits the cluster.

    What is there stays, but for a starter that nobody has changed and that another was asked for.
    """
    from hpcft.config.starter import run_starter

    if list_keys:
        click.echo(run_starter(_starters("runs")["lora"]), nl=False)
        return
    chosen = _pick("runs", run or "lora", "--run"), _pick("clusters", cluster or "local", "--cluster")
    texts = _wanted(folder, *chosen, again=bool(cluster), with_schema=with_schema)
    written = _absent(folder, texts, {"run.yaml": run, "cluster.yaml": cluster})
    _write(folder, {name: texts[name] for name in written})
    click.echo("\n".join(str(folder / name) for name in written))
    if kept := [str(folder / name) for name in texts if name not in written]:
        click.echo(f"{', '.join(kept)}: already there, left as it is", err=True)
    click.echo(f"\nnext: edit {folder / 'run.yaml'}, then: hpcft plan {folder / 'run.yaml'}", err=True)


def _wanted(folder: Path, run: Path, cluster: Path, again: bool, with_schema: bool) -> dict[str, str]:
    """File → text. again: a profile was asked for; else the run is made for the one that is there."""
    from hpcft.config.cluster import ClusterProfile
    from hpcft.config.load import load_cluster
    from hpcft.config.run import RunConfig
    from hpcft.config.starter import cluster_starter, run_starter, schema

    there = folder / "cluster.yaml"
    profile = load_cluster(str(there if there.is_file() and not again else cluster))[0]
    texts = {"run.yaml": run_starter(run, profile), "cluster.yaml": cluster_starter(cluster)}
    if with_schema:
        texts = {name: SCHEMA_LINE.format(name.removesuffix(".yaml")) + text for name, text in texts.items()}
        texts |= {"run.schema.json": schema(RunConfig), "cluster.schema.json": schema(ClusterProfile)}
    return texts


def _absent(folder: Path, texts: dict[str, str], asked: dict[str, str | None]) -> list[str]:
    """The files to write. Raises Refusal where there are none, or where a person's own is in the place of one."""
    from hpcft.errors import refuse

    there = [name for name in texts if (folder / name).exists()]
    other = [name for name in there if asked.get(name) and not _holds(folder / name, [texts[name]])]
    own = [name for name in other if not _holds(folder / name, _all_starters(name))]
    written = [name for name in texts if name not in there or name in other]
    if own or not written:
        shown = ", ".join(str(folder / name) for name in own or there)
        hint = "remove it first, or name another folder: hpcft init FOLDER"
        raise refuse(f"{shown}: already there", hint=hint)
    return written


def _holds(path: Path, texts: Iterable[str]) -> bool:
    """Whether the file is one of ``texts``, with or without the line that names its schema."""
    try:
        there = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    bare = there.removeprefix(SCHEMA_LINE.format(path.stem))
    return any(bare == text.removeprefix(SCHEMA_LINE.format(path.stem)) for text in texts)


def _all_starters(name: str) -> Iterator[str]:
    """Every text that init may have written under this name."""
    from hpcft.config.load import load_cluster
    from hpcft.config.starter import cluster_starter, run_starter

    clusters = _starters("clusters").values()
    if name == "cluster.yaml":
        yield from map(cluster_starter, clusters)
        return
    for profile in [load_cluster(str(path))[0] for path in clusters]:
        for run in _starters("runs").values():
            yield run_starter(run, profile)


def _starters(kind: str) -> dict[str, Path]:
    from hpcft.resources import templates

    return {path.stem: path for path in sorted((templates() / kind).glob("*.yaml"))}


def _pick(kind: str, name: str, option: str) -> Path:
    from hpcft.errors import near, refuse

    starters = _starters(kind)
    if name in starters:
        return starters[name]
    guess = near(name, starters)
    raise refuse(
        f"{option}: no such starter",
        where="command line",
        value=name,
        choices=starters,
        hint=f"did you mean {guess}?" if guess else "",
    )


def _write(folder: Path, texts: dict[str, str]) -> None:
    from hpcft.errors import refuse

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise refuse(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from error
