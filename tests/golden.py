"""The committed files that are made from code: rendered scripts and reference pages. `make golden` writes them anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcft.config.load import load_cluster, load_run
from hpcft.config.reference import catalog_page, cluster_page, run_page
from hpcft.launch.array import arrays
from hpcft.launch.render import render, render_array, render_preparation
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from tests import decisions

ROOT = Path(__file__).resolve().parent.parent

# Which starters are rendered for which profile: the cluster's page of examples.
SCRIPTS = {
    "infiniband-h100": ("lora", "full"),
    "slingshot-mi250x": ("lora", "full"),
    "cloud-spot": ("lora", "full"),
    "loopback": ("tiny",),
}

# Which starters are rendered as an array, and with which words: an example of a sweep.
SWEEPS = {"cloud-spot": ("lora", {"learning_rate": ("5e-5", "1e-4", "2e-4"), "lora_rank": ("8", "32")})}
# Of which of them the job that prepares the data is rendered too.
PREPARATIONS = {"infiniband-h100": ("lora",)}

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/run.md": run_page,
    "docs/reference/cluster.md": cluster_page,
    "docs/reference/catalog.md": catalog_page,
    "docs/reference/decisions.md": decisions.page,
}


def script(cluster: str, run: str) -> str:
    """What `hpcft render templates/runs/RUN.yaml --cluster CLUSTER` prints."""
    return render(plan(cluster, run, "--name", run))


def sweep(cluster: str) -> str:
    """The array of all combinations of a sweep's values."""
    run, keys = SWEEPS[cluster]
    plans = [
        plan(
            cluster,
            run,
            "--name",
            "-".join(values),
            *(f"{key}={value}" for key, value in zip(keys, values, strict=True)),
        )
        for values in itertools.product(*keys.values())
    ]
    (array,) = arrays("sweep", plans)
    return render_array(array)


def plan(cluster: str, run: str, *words: str) -> Plan:
    """The plan of a starter and further words on a profile."""
    loaded = load_run([str(ROOT / "templates" / "runs" / f"{run}.yaml"), *words])
    profile, _ = load_cluster(str(ROOT / "templates" / "clusters" / f"{cluster}.yaml"))
    return make_plan(loaded.run, profile, loaded.origins)


def preparation(cluster: str, run: str) -> str:
    """What `hpcft render --prepare` prints for the same."""
    return render_preparation(plan(cluster, run, "--name", run))


def goldens() -> Iterator[tuple[Path, Callable[[], str]]]:
    """Every golden file and what it should hold."""
    for cluster, runs in SCRIPTS.items():
        for run in runs:
            yield ROOT / "sbatch" / cluster / f"{run}.sbatch", lambda c=cluster, r=run: script(c, r)  # type: ignore[misc]
    for cluster in SWEEPS:
        yield ROOT / "sbatch" / cluster / "sweep.sbatch", lambda c=cluster: sweep(c)  # type: ignore[misc]
    for cluster, runs in PREPARATIONS.items():
        for run in runs:
            yield (
                ROOT / "sbatch" / cluster / f"{run}.prepare.sbatch",
                lambda c=cluster, r=run: preparation(c, r),  # type: ignore[misc]
            )
    for name, page in PAGES.items():
        yield ROOT / name, page


def main() -> None:
    """Write them all, and the texts that show what is trained."""
    from tests.data import masked

    for path, text in (*goldens(), *masked.goldens()):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = text()
        if not path.is_file() or path.read_text(encoding="utf-8") != new:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
