"""What every test may ask for: a clean environment, the private Slurm."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hpcft.slurm.environment import scrubbed
from tests.loopback import PACKAGES, LoopbackSlurm, missing_programs

# Warnings are errors, but not those of torch and its friends, which come and go with their releases.
_OTHERS_WARN = (("train",), ("data",))


def pytest_configure(config: pytest.Config) -> None:
    """Tests mean the same inside a job as outside; SLURM_CONF would point them at somebody's real cluster."""
    clean = scrubbed(os.environ)
    for name in set(os.environ) - set(clean) | {"SLURM_CONF", "HPCFT_RUN", "HPCFT_STORE"}:
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that asks for the private Slurm is marked ``slurm``; they all run in one worker, which starts it once."""
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))
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
    """A real Slurm of four nodes, n1 to n4, with 4 CPUs and two pretend GPUs each; see tests/loopback/."""
    if missing_programs():
        pytest.skip("Slurm is not installed here")
    with LoopbackSlurm(gpus=2) as cluster:
        yield cluster


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
