"""Many plans as one script: the table gives every element its own plan, to the byte, or refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.launch.accept import EXIT_FINISHED, accept_element
from hpcft.launch.array import arrays, element
from hpcft.launch.render import render_array
from hpcft.plan.plan import Plan, Source
from hpcft.plan.prediction import MemoryPlan
from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import RunPaths
from tests.plans import plan


def runs(count: int, **changes: Any) -> list[Plan]:
    return [
        plan(name=f"run-{i}", optim={"learning_rate": 1e-5 * (i + 1)}, resources={"job_name": f"run-{i}"}, **changes)
        for i in range(count)
    ]


def in_script(script: str) -> str:
    """What the script gives to ``accept``."""
    return script.split("cat <<'HPCFT_PLAN'\n")[1].split("HPCFT_PLAN\n")[0]


def test_every_element_gets_the_bytes_of_its_plan() -> None:
    plans = [
        *runs(3),
        plan(name="données «\\n» 'x' $HOME", data={"train": (Source(path="a.jsonl", weight=0.5), Source(path="b"))}),
        plan(name="schema", tuner={"kind": "lora"}, train={"seed": 9}),
    ]
    (array,) = arrays("sweep", plans)
    held = in_script(render_array(array))
    assert [element(held, str(i)) for i in range(5)] == [one.to_json() for one in plans]


def test_a_section_that_some_runs_do_not_have_is_one_value() -> None:
    memory = MemoryPlan(**dict.fromkeys(MemoryPlan.__dataclass_fields__, 1))  # type: ignore[arg-type]
    plans = [plan(name="a", memory=memory), plan(name="b", memory=None), plan(name="c", memory=memory)]
    (array,) = arrays("sweep", plans)
    assert [element(in_script(render_array(array)), str(i)) for i in range(3)] == [one.to_json() for one in plans]


def test_the_table_shows_what_differs_for_every_run_and_nothing_else() -> None:
    (array,) = arrays("sweep", runs(2))
    assert array.rows[1].endswith(' {"name": "run-1", "optim.learning_rate": 2e-05, "resources.job_name": "run-1"}'), (
        array.rows[1]
    )
    assert array.rows[0].startswith(f"0 {array.plans[0].fingerprint} ")


def test_arrays_are_as_large_as_slurm_takes_them_and_lose_nobody() -> None:
    plans = runs(25)
    parts = arrays("sweep", plans, most=10)
    assert [part.indices for part in parts] == ["0-9", "0-9", "0-4"]
    assert [one for part in parts for one in part.plans] == plans
    row = len(parts[0].rows[0])
    small = arrays("sweep", plans, script_bytes=64 * 1024 + len(plans[0].to_json()) + 6 * row)
    assert 4 <= len(small) <= 9
    assert [one for part in small for one in part.plans] == plans


def test_runs_that_ask_slurm_for_other_things_stand_in_another_array() -> None:
    plans = [*runs(2), plan(name="long", resources={"time_minutes": 600}), plan(name="short")]
    assert [[one.name for one in part.plans] for part in arrays("sweep", plans, at_once=4)] == [
        ["run-0", "run-1", "short"],
        ["long"],
    ]
    assert arrays("sweep", plans, at_once=4)[0].indices == "0-2%4"


def test_two_runs_of_one_name_are_refused() -> None:
    with pytest.raises(Refusal, match="two runs of a sweep have the same"):
        arrays("sweep", [plan(), plan(train={"seed": 1})])


@pytest.mark.parametrize(
    ("name", "words"), [("a/b", "name of a folder"), ("..", "name of a folder"), ("x\udcff", "not Unicode")]
)
def test_a_name_that_cannot_stand_in_a_script_is_refused(name: str, words: str) -> None:
    (array,) = arrays("sweep", [plan(), plan(name=name)])
    with pytest.raises(Refusal, match=words):
        render_array(array)


@pytest.mark.parametrize("name", ["two words", "x\n#SBATCH --uid=0", "$(id)", ""])
def test_an_array_name_that_is_no_word_is_refused(name: str) -> None:
    (array,) = arrays(name, runs(2))
    with pytest.raises(Refusal):
        render_array(array)


@pytest.mark.parametrize(
    ("edit", "number", "words"),
    [
        (lambda text: text, "7", "no such element"),
        (lambda text: text, "", "no such element"),
        (lambda text: text.replace("2e-05", "9.0"), "1", "and not"),
        (lambda text: text.replace('"seed": 7', '"seed": 8'), "1", "and not"),
        (lambda text: text.replace('"optim.learning_rate"', '"optim.speed"'), "1", "broken"),
        (lambda text: text[:-30], "1", "broken"),
        (lambda text: "", "1", "no such element"),
    ],
)
def test_a_script_that_is_not_whole_or_was_edited_is_refused(edit: Any, number: str, words: str) -> None:
    (array,) = arrays("sweep", runs(2))
    held = in_script(render_array(array))
    assert element(held, "1")
    with pytest.raises(Refusal, match=words):
        element(edit(held), number)


def test_an_element_takes_up_its_own_run_under_its_own_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (array,) = arrays("sweep", runs(3))
    held = in_script(render_array(array))
    # In an array SLURM_JOB_ID of the last element is the number of the whole array.
    environ = {"SLURM_JOB_ID": "50", "SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": "2"}
    assert accept_element(held, "2", tmp_path, environ) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run-2\n"
    paths = RunPaths(tmp_path / "run-2")
    assert paths.plan.read_text() == array.plans[2].to_json()
    assert [event["job"] for event in read_events(paths)] == ["50_2"]
    assert not (tmp_path / "run-0").exists()
    Ledger(paths, "rank-0000", environ).write("finished", step=1)
    assert accept_element(held, "2", tmp_path, environ) == EXIT_FINISHED


def test_the_script_is_the_same_every_time_and_bash_takes_it(tmp_path: Path) -> None:
    text = render_array(arrays("sweep", runs(3))[0])
    assert text == render_array(arrays("sweep", runs(3))[0])
    (tmp_path / "x").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "x"], check=True)
    assert "#SBATCH --array=0-2\n" in text
    assert "#SBATCH --output=%x-%A_%a.log\n" in text
