"""What every test may ask for: a clean environment, the private Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.slurm.environment import scrubbed
from tests.loopback import PACKAGES, LoopbackSlurm, missing_programs

ROOT = Path(__file__).resolve().parent.parent

# Warnings are errors, but not those of torch and its friends, which come and go with their releases.
_OTHERS_WARN = (("train",), ("data",))


def pytest_configure(config: pytest.Config) -> None:
    """Tests mean the same inside a job as outside; what scrubbing keeps would point them at a real cluster."""
    clean = {name for name in scrubbed(os.environ) if not name.startswith("SLURM_")}
    for name in set(os.environ) - clean | {"HPCFT_RUN", "HPCFT_STORE"}:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that asks for the private Slurm is marked ``slurm``; ``campaign`` is left out of a usual run."""
    if os.environ.get("HPCFT_CAMPAIGN") != "1":
        left = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
        if item.path.relative_to(config.rootpath).parts[1:2] in _OTHERS_WARN:
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing := missing_programs():
        terminalreporter.write_line(
            f"!!! NO SLURM HERE (no {', '.join(missing)}): every test against a real Slurm was SKIPPED. "
            f"Install it with: apt-get install {' '.join(PACKAGES)}",
            red=True,
            bold=True,
        )


@pytest.fixture(scope="session")
def slurm() -> Iterator[LoopbackSlurm]:
    """A real Slurm of four nodes, n1 to n4, with 4 CPUs and two pretend GPUs each; see tests/loopback/.

    Each pytest worker has its own: it is up in a third of a second, and most of its tests wait for Slurm.
    """
    if missing_programs():
        pytest.skip("Slurm is not installed here")
    with LoopbackSlurm(gpus=2) as cluster:
        # A killed pytest runs no teardown; the guard sees its end of the pipe close and takes the cluster down.
        args = [sys.executable, "-m", "tests.loopback", "guard", "--folder", str(cluster.folder)]
        with subprocess.Popen(args, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True) as guard:
            yield cluster
            assert guard.poll() is None


@pytest.fixture(autouse=True)
def _slurm_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """During a test that asks for ``slurm``, this process talks to it; afterwards none of its jobs is left."""
    if "slurm" not in request.fixturenames:
        yield
        return
    cluster: LoopbackSlurm = request.getfixturevalue("slurm")
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    yield
    cluster.cancel_all()
