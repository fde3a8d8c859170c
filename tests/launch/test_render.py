"""The script: the same bytes, no foreign code, clean for bash and shellcheck, and its Plan comes out as it went in."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch.render import RESERVED, expand, gpu_option, render
from hpcft.plan.plan import Plan, Variable
from tests.plans import layout, plan

EIGHT_GPUS = {"gpus_per_node": 8, "gpu_type": "h100", "accelerator": "cuda", "backend": "nccl"}
HOSTILE = [
    "a\nb",
    "a\r",
    "a;rm -rf x",
    "$(id)",
    "`id`",
    "a b",
    'a"b',
    "a'b",
    "a\\b",
    "a#b",
    "a\x1bb",
    "",
    " ",
    "é",
    "{{ x }}",
]


def variants() -> list[Plan]:
    return [
        plan(),
        plan(
            layout=layout(2, 8), resources={"nodes": 2, "tasks_per_node": 8, "gpu_request": "gres_typed", **EIGHT_GPUS}
        ),
        plan(resources={"launcher": "torchrun", "prepare": "in_job", "setup": ("module load a", "source b/c")}),
        plan(
            name='it\'s a "name" with $HOME and `id`',
            environment=(Variable(name="A", value="${B:-/tmp}/x 'y' \"z\" $(id)", reason="it's\nso # really"),),
        ),
        plan(
            resources={
                "partition": "a,b",
                "account": "x",
                "qos": "q",
                "memory": "0",
                "exclusive": True,
                "requeue": False,
            }
        ),
    ]


@pytest.mark.parametrize("plan", variants())
def test_the_script_is_clean_for_bash_and_shellcheck(plan: Plan, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(render(plan))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("plan", variants())
def test_the_same_plan_gives_the_same_bytes_and_carries_itself(plan: Plan) -> None:
    script = render(plan)
    assert script == render(Plan.from_json(plan.to_json()))
    carried = re.search(r"<<'HPCFT_PLAN'\n(.*?)^HPCFT_PLAN$", script, re.DOTALL | re.MULTILINE)
    assert carried is not None
    assert carried[1] == plan.to_json()


def test_nothing_of_this_machine_is_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(plan())
    monkeypatch.setenv("HOME", "/home/somebody-else")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert render(plan()) == before
    assert str(Path.home()) not in before
    assert not re.search(r"20\d\d-\d\d-\d\d", before)


@pytest.mark.parametrize("field", ["job_name", "partition", "account", "qos", "constraint", "reservation", "memory"])
@pytest.mark.parametrize("value", [v for v in HOSTILE if v])
def test_a_value_that_could_run_on_a_directive_line_is_refused(field: str, value: str) -> None:
    with pytest.raises(Refusal, match="#SBATCH"):
        render(plan(resources={field: value}))


@pytest.mark.parametrize("extra", ["--x\n--y", "--x=a b", "-N4", "rm", "--x=$(id)", "--comment=a#b"])
def test_an_extra_option_that_is_none_is_refused(extra: str) -> None:
    with pytest.raises(Refusal, match="not an sbatch option"):
        render(plan(resources={"extra": (extra,)}))


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_an_extra_option_that_the_script_sets_itself_is_refused_and_its_owner_named(name: str) -> None:
    with pytest.raises(Refusal, match=re.escape(RESERVED[name])):
        render(plan(resources={"extra": (f"--{name}=1",)}))


def test_other_extra_options_stand_in_the_header() -> None:
    script = render(plan(resources={"extra": ("--mail-type=END", "--hint=nomultithread", "--spread-job")}))
    header = script.partition("umask")[0]
    for line in ("#SBATCH --mail-type=END", "#SBATCH --hint=nomultithread", "#SBATCH --spread-job"):
        assert f"\n{line}\n" in header


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a\x1b[2J", "a\u2028b"])
def test_a_run_whose_name_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="name"):
        render(plan(name=name))


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_in_the_environment_arrives_as_it_is(value: str, tmp_path: Path) -> None:
    chosen = plan(environment=(Variable(name="CANARY", value=value, reason=value),))
    if not value.isprintable():
        with pytest.raises(Refusal, match="line break"):
            render(chosen)
        return
    exports = re.findall(r"^(?:#.*\n)?export CANARY=.*$", render(chosen), re.MULTILINE)
    shell = f'{exports[0]}\nprintf %s "$CANARY"'
    assert subprocess.run(["bash", "-uc", shell], capture_output=True, text=True, cwd=tmp_path).stdout == value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("${A}/x", "1 2/x"),
        ("$A/x", "1 2/x"),
        ("x/$A", "x/$A"),
        ("${B:-/tmp}/y", "/tmp/y"),
        ("${A:-/tmp}", "1 2"),
        ("${A:-$(id)}", "${A:-$(id)}"),
        ("${A/1/2}", "${A/1/2}"),
    ],
)
def test_only_plain_variables_expand(value: str, found: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s {expand(value)}"], env={"A": "1 2"}, capture_output=True, text=True
    )
    assert done.stdout == found


@pytest.mark.parametrize(
    ("form", "kind", "line"),
    [
        ("gres", None, "gres=gpu:8"),
        ("gres", "h100", "gres=gpu:8"),
        ("gres_typed", "h100", "gres=gpu:h100:8"),
        ("gpus_per_node", None, "gpus-per-node=8"),
        ("gpus_per_node", "h100", "gpus-per-node=h100:8"),
        ("none", "h100", None),
    ],
)
def test_gpus_are_asked_for_per_node_in_the_clusters_form(form: str, kind: str | None, line: str | None) -> None:
    assert gpu_option(plan(resources={**EIGHT_GPUS, "gpu_request": form, "gpu_type": kind}).resources) == line


def test_a_typed_request_without_a_type_is_refused_with_the_command_that_shows_types() -> None:
    with pytest.raises(Refusal, match="sinfo"):
        render(plan(resources={**EIGHT_GPUS, "gpu_request": "gres_typed", "gpu_type": None}))


def test_one_task_per_node_gets_the_cores_of_all_its_ranks() -> None:
    script = render(
        plan(layout=layout(1, 4), resources={"tasks_per_node": 4, "cpus_per_task": 6, "launcher": "torchrun"})
    )
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=24\n" in script
    assert "hpcft.launch.ranks" in script


def test_a_template_of_ones_own_may_use_our_parts(tmp_path: Path) -> None:
    own = tmp_path / "mine.j2"
    own.write_text('#!/bin/bash\n{% include "parts/header.j2" %}\n# {{ plan.name | comment }}\n')
    assert render(plan(), own).splitlines()[1] == "#SBATCH --job-name=tiny"


@pytest.mark.parametrize(("text", "words"), [("{{ nothing }}", "'nothing' is undefined"), ("{% if %}", "mine.j2:1")])
def test_a_broken_template_is_refused(text: str, words: str, tmp_path: Path) -> None:
    own = tmp_path / "mine.j2"
    own.write_text(text)
    with pytest.raises(Refusal, match=words):
        render(plan(), own)
    with pytest.raises(Refusal, match="not there"):
        render(plan(), tmp_path / "other.j2")


@pytest.mark.parametrize("value", ["{{ 7 * 7 }}", "{% include '/etc/passwd' %}"])
def test_a_value_is_never_taken_for_a_template(value: str) -> None:
    changed: Any = plan(
        resources={"setup": (f"echo '{value}'",)}, environment=(Variable(name="A", value=value, reason="x"),)
    )
    assert render(changed).count(value) == 4  # the setup line, the export, and both in the carried Plan
