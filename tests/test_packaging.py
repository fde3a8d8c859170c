"""hpcft as people install it: a wheel, an editable install and a plain checkout all have the same templates."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpcft import __version__

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
BUILD = ["--no-deps", "--no-build-isolation", "--no-index", "--use-pep517"]
FILES = sorted(str(file.relative_to(ROOT / "templates")) for file in (ROOT / "templates").rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that no build folder or egg-info is left in the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    names = ["hpcft", "templates", "setup.cfg", "setup.py", "README.md", "LICENSE"]
    there = [name for name in names if (ROOT / name).exists()]
    skip = ["--exclude=__pycache__", "--exclude=*.egg-info"]
    packed = subprocess.run(["tar", "-c", *skip, *there], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=packed, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", *BUILD, "-w", str(folder), str(checkout)], check=True, capture_output=True)
    return next(folder.glob("hpcft-*.whl"))


def seen_from(place: Path) -> tuple[Path, list[str]]:
    """Where a Python that finds hpcft in ``place`` finds templates, and which."""
    program = (
        "import hpcft.resources as r; t = r.templates(); print(t); [print(f.relative_to(t)) for f in t.rglob('*')]"
    )
    environ = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd="/", env=environ, check=True, capture_output=True, text=True
    )
    folder, *files = done.stdout.splitlines()
    return Path(folder), sorted(name for name in files if (Path(folder) / name).is_file())


def test_a_checkout_has_its_templates_beside_the_package(checkout: Path) -> None:
    assert seen_from(checkout) == (checkout / "templates", FILES)


def test_a_wheel_has_its_templates_inside_the_package(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel)], check=True)
    assert seen_from(tmp_path) == (tmp_path / "hpcft/templates", FILES)


def test_an_editable_install_has_the_templates_of_its_checkout(checkout: Path, tmp_path: Path) -> None:
    subprocess.run([*PIP, "install", *BUILD, "--target", str(tmp_path), "-e", str(checkout)], check=True)
    # pip writes either a path file or a finder beside the packages; site reads both only in a site folder.
    program = f"import site; site.addsitedir({str(tmp_path)!r}); import hpcft.resources as r; print(r.templates())"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd="/", check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == checkout / "templates"


def test_a_wheel_has_every_module_the_licence_and_the_command(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "hpcft").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert "hpcft/py.typed" in names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "hpcft = hpcft.cli.main:main" in zipfile.ZipFile(wheel).read(entry).decode()
    assert f"hpcft-{__version__}-" in wheel.name


def test_every_locked_package_satisfies_the_ranges_of_the_setup() -> None:
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], setup["options.extras_require"]["dev"]]
    wanted = [Requirement(line) for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    locked = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(locked.values()), "exact versions only"
    for each in wanted:
        if each.name == "hpcft":
            continue
        assert locked[each.name.lower().replace("_", "-")] in each.specifier, each


def test_no_host_stands_in_the_lock_or_the_makefile() -> None:
    for name in ("requirements.lock", "Makefile", "setup.cfg"):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
        assert "--index-url" not in text, name
