"""``hpcft init``: a run and a cluster profile to start from."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("init")
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@click.option(
    "--run", "run", metavar="NAME", default="lora", show_default=True, help="Which starter: lora, full, tiny."
)
@click.option("--cluster", metavar="NAME", help="Profile to start from; none: this machine, without Slurm.")
@click.option("--schema", "with_schema", is_flag=True, help="Also write JSON schemas for editors.")
@click.option("--list", "list_keys", is_flag=True, help="Print every key of a run and stop.")
def command(folder: Path, run: str, cluster: str | None, with_schema: bool, list_keys: bool) -> None:
    """Write run.yaml and cluster.yaml into FOLDER, a comment over every key. Nothing is overwritten."""
    from hpcft.config.cluster import ClusterProfile
    from hpcft.config.run import RunConfig
    from hpcft.config.starter import cluster_starter, run_starter, schema

    runs, clusters = _starters("runs"), _starters("clusters")
    if list_keys:
        click.echo(run_starter(runs["lora"]), nl=False)
        return
    texts = {
        "run.yaml": run_starter(_pick(runs, run, "--run")),
        "cluster.yaml": cluster_starter(_pick(clusters, cluster or "local", "--cluster")),
    }
    if with_schema:
        texts |= {"run.schema.json": schema(RunConfig), "cluster.schema.json": schema(ClusterProfile)}
        texts["run.yaml"] = "# yaml-language-server: $schema=run.schema.json\n" + texts["run.yaml"]
        texts["cluster.yaml"] = "# yaml-language-server: $schema=cluster.schema.json\n" + texts["cluster.yaml"]
    _write(folder, texts)
    click.echo("\n".join(str(folder / name) for name in texts))
    click.echo(f"\nnext: edit {folder / 'run.yaml'}, then: hpcft plan {folder / 'run.yaml'}", err=True)


def _starters(kind: str) -> dict[str, Path]:
    from hpcft.resources import templates

    return {path.stem: path for path in sorted((templates() / kind).glob("*.yaml"))}


def _pick(starters: dict[str, Path], name: str, option: str) -> Path:
    from hpcft.errors import near, refuse

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

    there = [str(folder / name) for name in texts if (folder / name).exists()]
    if there:
        raise refuse(f"{', '.join(there)}: already there", hint="name another folder: hpcft init FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise refuse(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from error
