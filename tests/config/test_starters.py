"""Starters: what `hpcft init` writes loads unchanged and means what its template means; the schema knows its keys."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.cluster import ClusterProfile
from hpcft.config.leaves import sections
from hpcft.config.load import load_cluster, load_run
from hpcft.config.run import RunConfig
from hpcft.config.source import plain, read_yaml
from hpcft.config.starter import cluster_starter, run_starter, schema
from hpcft.plan.explain import explain
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from tests.words import PROFILES, ROOT, STARTERS, profile, starter, write


def planned(file: str, cluster: ClusterProfile) -> Plan:
    loaded = load_run([file])
    return make_plan(loaded.run, cluster, loaded.origins)


@pytest.mark.parametrize("cluster", PROFILES)
@pytest.mark.parametrize("name", STARTERS)
def test_every_starter_plans_on_every_profile_and_is_explained(name: str, cluster: str) -> None:
    words = [str(starter(name))]
    if profile(cluster).scheduler == "none":
        words += ["--nodes", "1"]
    if profile(cluster).max_nodes == 4:
        words += ["--time", "20"]
    loaded = load_run(words)
    plan = make_plan(loaded.run, profile(cluster), loaded.origins)
    page = explain(plan, None, {})
    assert plan.name in page
    assert str(plan.batch.global_windows) in page
    assert all(variable.name in page for variable in plan.environment)


@pytest.mark.parametrize("name", STARTERS)
def test_a_written_run_gives_the_plan_of_its_template(tmp_path: Path, name: str) -> None:
    cluster = profile("infiniband-h100")
    file = write(tmp_path, run_starter(starter(name)))
    assert planned(file, cluster) == planned(str(starter(name)), cluster)


@pytest.mark.parametrize("name", PROFILES)
def test_a_written_profile_gives_the_plan_of_its_template(tmp_path: Path, name: str) -> None:
    template = ROOT / "templates" / "clusters" / f"{name}.yaml"
    file = write(tmp_path, cluster_starter(template), "cluster.yaml")
    assert load_cluster(file)[0] == load_cluster(str(template))[0]


@pytest.mark.parametrize("name", STARTERS)
def test_a_written_run_has_a_comment_over_every_key(name: str) -> None:
    lines = run_starter(starter(name)).splitlines()
    for leaf in (leaf for leaves in sections().values() for leaf in leaves):
        (at,) = [i for i, line in enumerate(lines) if re.match(rf"\s*(# )?{leaf}: ", line) and "# ----" not in line]
        assert lines[at - 1].lstrip().startswith("# "), leaf


@pytest.mark.parametrize("name", STARTERS)
def test_a_commented_key_stands_at_its_default_and_may_be_uncommented(tmp_path: Path, name: str) -> None:
    text = run_starter(starter(name))
    whole = re.sub(r"^(\s*)# ([a-z_0-9]+: .*)$", _uncommented, text, flags=re.MULTILINE)
    assert whole.count("\n") == text.count("\n")
    cluster = profile("infiniband-h100")
    before, after = planned(write(tmp_path, text), cluster), planned(write(tmp_path, whole), cluster)
    assert dataclasses.replace(after, name=before.name) == before


def _uncommented(match: re.Match[str]) -> str:
    """The line without its #, where it is a key and no sentence with a colon in it."""
    names = {leaf for leaves in sections().values() for leaf in leaves}
    return f"{match[1]}{match[2]}" if match[2].partition(":")[0] in names else match[0]


def accepts(schema_: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a JSON schema accepts a value: as much of the standard as our schemas use."""
    if "$ref" in schema_:
        return accepts(root["$defs"][schema_["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema_:
        return any(accepts(one, value, root) for one in schema_["anyOf"])
    if "enum" in schema_ or "const" in schema_:
        return value in schema_.get("enum", [schema_.get("const")])
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema_["type"]]) or (isinstance(value, bool) and schema_["type"] != "boolean"):
        return False
    if isinstance(value, dict):
        known = schema_.get("properties", {})
        extra = schema_.get("additionalProperties", True)
        inner = [(known.get(key, extra), item) for key, item in value.items()]
        return all(one is True or (one is not False and accepts(one, item, root)) for one, item in inner)
    if isinstance(value, list):
        return len(value) >= schema_.get("minItems", 0) and all(accepts(schema_["items"], v, root) for v in value)
    if isinstance(value, str):
        return re.search(schema_.get("pattern", ""), value) is not None
    return schema_.get("minimum", value) <= value <= schema_.get("maximum", value) if value is not None else True


def plain_yaml(path: Path) -> Any:
    tree, shown = read_yaml(path)
    return plain(tree, shown)


@pytest.mark.parametrize("name", STARTERS)
def test_the_schema_accepts_every_starter(name: str) -> None:
    described = json.loads(schema(RunConfig))
    assert accepts(described, plain_yaml(starter(name)), described)


@pytest.mark.parametrize("name", PROFILES)
def test_the_schema_accepts_every_profile(name: str) -> None:
    described = json.loads(schema(ClusterProfile))
    assert accepts(described, plain_yaml(ROOT / "templates" / "clusters" / f"{name}.yaml"), described)


@pytest.mark.parametrize("bad", [{"zzz": 1}, {"nodes": "x"}, {"tuner": {"tuner_type": "x"}}, {"slurm": {"nodes": 0}}])
def test_the_schema_marks_what_the_loader_refuses(bad: dict[str, Any]) -> None:
    described = json.loads(schema(RunConfig))
    assert not accepts(described, {"model": {"model": "m"}, "data": {"dataset": ["a"]}, **bad}, described)


def test_every_key_is_described_in_the_schema() -> None:
    described = json.loads(schema(RunConfig))
    for definition in described["$defs"].values():
        for name, leaf in definition.get("properties", {}).items():
            assert leaf.get("description"), name
