"""The parts of ``make demo``, quickly: its task, its tokenizer, how it asks a model, its curve, its run.yaml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.demo import answers, curve, newborn, task
from hpcft.cli.common import plan_run

DEMO = Path(task.__file__).parent

pytestmark = pytest.mark.filterwarnings("default")  # transformers' and matplotlib's warnings come and go


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo trains from."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    newborn.write(folder)
    return folder


def test_an_answer_is_the_letters_in_the_order_that_was_asked_for() -> None:
    assert task.example("stone", task.FORWARDS) == ("sort stone", "enost")
    assert task.example("stone", task.BACKWARDS) == ("sort backwards stone", "tsone")


def test_the_same_seed_gives_the_same_examples_and_no_letters_twice() -> None:
    drawn = task.examples(2000, seed=1)
    assert drawn == task.examples(2000, seed=1) != task.examples(2000, seed=2)
    assert len({frozenset(e.answer) for e in drawn}) == 2000
    assert {e.question.rpartition(" ")[0] for e in drawn} == {task.FORWARDS, task.BACKWARDS}


def test_the_letters_of_a_fresh_question_are_in_no_example() -> None:
    kept_out = next(e for e in task.examples(50, seed=1) if len(e.answer) == task.SHORTEST).answer
    again = task.examples(2000, seed=1, without=[kept_out])
    assert all(frozenset(e.answer) != frozenset(kept_out) for e in again)


def test_a_question_in_another_order_of_its_letters_counts_as_seen() -> None:
    trained = [task.example("tca"), task.example("dgo", task.BACKWARDS)]
    assert task.unseen([task.example("dogs")], trained)
    assert not task.unseen([task.example("dogs"), task.example("act", task.BACKWARDS)], trained)


def test_records_are_conversations_that_read_back_the_same(tmp_path: Path) -> None:
    drawn = task.examples(20, seed=3)
    task.write(tmp_path / "some.jsonl", drawn)
    first = json.loads((tmp_path / "some.jsonl").read_text().splitlines()[0])
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert task.read(tmp_path / "some.jsonl") == drawn


def test_every_letter_is_a_token_and_so_is_each_word_of_the_task(model_folder: Path) -> None:
    _, tokenizer = answers.newborn(model_folder, seed=0)
    assert tokenizer.tokenize("sort backwards resort") == ["sort", "Ġ", "backwards", "Ġ", *"resort"]
    assert tokenizer.decode(tokenizer("Größe 大").input_ids) == "Größe 大"


def test_what_is_trained_begins_with_what_is_asked(model_folder: Path) -> None:
    _, tokenizer = answers.newborn(model_folder, seed=0)
    turns = [{"role": "user", "content": "sort dog"}, {"role": "assistant", "content": "dgo"}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    trained = tokenizer.apply_chat_template(turns, tokenize=False)
    assert trained == asked + "dgo" + tokenizer.eos_token


def test_a_model_answers_in_a_batch_as_it_does_alone(model_folder: Path) -> None:
    model, tokenizer = answers.newborn(model_folder, seed=5)
    questions = ["sort ab", "sort backwards abcdefghij", "sort xyz"]
    alone = [answers.answers(model, tokenizer, [question])[0] for question in questions]
    assert answers.answers(model, tokenizer, questions) == alone
    assert len(set(alone)) == 3  # else anything would agree with anything


def test_the_same_seed_gives_the_same_random_weights(model_folder: Path) -> None:
    one, other, third = (answers.newborn(model_folder, seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert one.equal(other)
    assert not one.equal(third)


def test_only_whole_answers_count() -> None:
    assert answers.exact_match(["abc", "ab", "", "xyz"], ["abc", "abc", "abc", "xyz"]) == 0.5


def test_the_curve_shows_each_step_once_and_tells_the_last_losses(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 2.0 / n} for n in range(1, 5)]
    lines[2:2] = [{"step": 2, "eval_loss": 1.5}]
    lines += [{"resumed_at": 2}, {"step": 3, "loss": 0.5}, {"step": 3, "eval_loss": 0.25}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve.points(metrics, "loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert curve.draw(metrics, tmp_path / "curve.png", "a title") == (0.5, 0.25)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_yaml_plans_two_ranks_on_this_machine(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    for name in ("train.jsonl", "heldout.jsonl"):
        task.write(Path(name), task.examples(5, seed=1))
    plan = plan_run([str(DEMO / "run.yaml")]).plan
    assert plan.name == "sorting"
    assert (plan.layout.world_size, plan.resources.cluster, plan.model.from_scratch) == (2, "local", True)
    longest = task.example("a" * task.LONGEST, task.BACKWARDS)
    assert len(longest.question + longest.answer) < plan.data.max_length


def test_the_demo_itself_loads_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, demo; print(demo.RUN, 'torch' in sys.modules)"],
        cwd=DEMO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["sorting", "False"]


@pytest.mark.parametrize(("before", "after", "code"), [(0.0, 0.97, 0), (0.2, 0.97, 1), (0.0, 0.89, 1)])
def test_a_number_that_is_missed_ends_the_demo_with_a_sentence(before: float, after: float, code: int) -> None:
    without_the_work = f"""
import demo
for name in ("clean", "train", "picture", "write_inputs", "seed_of_the_run"):
    setattr(demo, name, lambda *_: None)
demo.answers.newborn = lambda *_: (None, None)
demo.examine, demo.ask_the_exported = lambda *_: {before}, lambda *_: {after}
demo.main()
"""
    done = subprocess.run([sys.executable, "-c", without_the_work], cwd=DEMO, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().startswith("the demo failed: " if code else "")
    assert ("hpcft status" in done.stdout) == (code == 0)
