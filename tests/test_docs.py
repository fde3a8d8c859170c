"""The pages for people are true: links lead somewhere, verbs exist, the README's run is planned as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpcft.cli.main import VERBS
from hpcft.config.load import load_cluster, load_run
from hpcft.plan.explain import explain
from hpcft.plan.make import make_plan
from tests.words import ROOT, write

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not _leads(page, link)] == []


def _leads(page: Path, link: str) -> bool:
    """Whether the file is there, and in it the heading that the link names."""
    name, _, heading = link.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
        return False
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
    return not heading or heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_shown_exist(page: Path) -> None:
    shown = re.findall(r"(?:`|^\$? ?)hpcft ([a-z]\w*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(set(shown) - set(VERBS) - {"turns"}) == []


def test_the_code_names_no_verb_that_does_not_exist() -> None:
    for file in sorted((ROOT / "hpcft").rglob("*.py")):
        shown = re.findall(r"(?:`|hint=f?\"[^\"]*|next: |or: )hpcft ([a-z]+)\b", file.read_text(encoding="utf-8"))
        assert sorted(set(shown) - set(VERBS)) == [], file


def test_the_readmes_run_is_planned_as_the_readme_says(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    yaml, console = (re.findall(rf"```{kind}\n(.*?)```", readme, re.DOTALL)[0] for kind in ("yaml", "console"))
    loaded = load_run([write(tmp_path, yaml)])
    cluster, _ = load_cluster(str(ROOT / "templates" / "clusters" / "infiniband-h100.yaml"))
    plan = make_plan(loaded.run, cluster, loaded.origins)
    printed = [line for line in console.splitlines() if line and not line.startswith(("$", "…"))]
    assert len(printed) == 3
    assert [line for line in printed if line not in explain(plan, None, {}).splitlines()] == []
    assert set(re.findall(r"hpcft (?:status|logs -f|export) (\S+)", console)) == {plan.name}


def test_every_module_is_on_the_map() -> None:
    """Verbs, strategies, objectives and formats have tables of their own."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chart = page[page.index("```\nhpcft/") : page.index("## What holds")]
    modules = [
        *(ROOT / "hpcft").glob("*.py"),
        *(ROOT / "hpcft").glob("[!c]*/*.py"),
        *(ROOT / "hpcft").glob("config/*.py"),
    ]
    names = {module.stem for module in modules if not module.stem.startswith("__")}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", chart)) == []
