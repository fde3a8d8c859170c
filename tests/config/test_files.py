"""Run files: what is wrong in them is said with file and line, all of it at once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hpcft.config.load import load_run
from hpcft.errors import Problem
from tests.words import complaints, write

WHOLE = "model: m\ndataset: a.jsonl\n"


def only(problems: tuple[Problem, ...]) -> Problem:
    """The one problem."""
    (problem,) = problems
    return problem


def test_an_unknown_key_is_refused_with_the_nearest_name_and_where_that_belongs(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "train:\n  leerning_rate: 1e-4\n")
    problem = only(complaints(file))
    assert problem.where == f"{file}:4"
    assert problem.what == "train.leerning_rate: no such key"
    assert problem.value == "0.0001"
    assert problem.hint == "did you mean learning_rate? (here: train.learning_rate)"


def test_an_unknown_key_that_is_near_another_tools_word_names_ours(tmp_path: Path) -> None:
    problem = only(complaints(write(tmp_path, WHOLE + "cutof_len: 7\n")))
    assert problem.hint == "did you mean cutoff_len? (here: data.max_length)"


def test_an_unknown_key_near_nothing_gets_the_list_of_all_keys(tmp_path: Path) -> None:
    assert only(complaints(write(tmp_path, WHOLE + "xyzzy: 1\n"))).hint == "every key is listed by: hpcft init --list"


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("models: {model: m}\ndataset: a\n", "model"),
        ("model: m\ndat: {dataset: a}\n", "data"),
        (WHOLE + "tunner: {tuner_type: full}\n", "tuner"),
        (WHOLE + "checkpoints: {save_steps: 5}\n", "checkpoint"),
        (WHOLE + "slrum: {nodes: 2}\n", "slurm"),
        (WHOLE + "Train: {max_steps: 5}\n", "train"),
        (WHOLE + "training: {max_steps: 5}\n", "train"),
    ],
)
def test_a_misspelt_section_is_named_and_what_stands_in_it_is_not_missing(
    tmp_path: Path, text: str, section: str
) -> None:
    problem = only(complaints(write(tmp_path, text)))
    assert problem.what.endswith(": no such section")
    assert problem.hint == f"did you mean the section {section}?"


def test_a_section_that_resembles_none_is_read_all_the_same(tmp_path: Path) -> None:
    first, second = complaints(write(tmp_path, "everything:\n  model: m\n  dataset: a\n  seed: x\n"))
    assert (first.what, first.hint) == ("everything: no such section", "its keys may as well stand on top")
    assert second.what == "everything.seed: must be a whole number"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (WHOLE + "tuner: lora\n", "tuner: {tuner_type: lora}"),
        (WHOLE + "objective: dpo\n", "objective: {beta: …}"),
        ("model: m\ndata: a.jsonl\n", "data: {dataset: …}"),
    ],
)
def test_a_value_in_the_place_of_a_section_is_told_the_key_that_it_needs(tmp_path: Path, text: str, hint: str) -> None:
    problem = only(complaints(write(tmp_path, text)))
    assert problem.what.endswith(": is a section, and no key")
    assert problem.hint == f"its keys stand under it: {hint}"


@pytest.mark.parametrize("text", ["modle: m\ndataset: a\n", "model: m\ndatasets: [{pth: a}]\n"])
def test_what_was_said_and_not_understood_is_not_called_missing_too(tmp_path: Path, text: str) -> None:
    assert "missing" not in only(complaints(write(tmp_path, text))).what


def test_every_problem_is_reported_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = "model: m\nnodes: many\nzzz: 1\npacking: perhaps\nlora_rank: 0\ntuner_type: lorra\ntime: soon\n"
    problems = complaints(write(tmp_path, text), "--nproc_per_node", "x")
    lines = [problem.where.rpartition(":")[2] for problem in problems]
    assert sorted(lines) == sorted(["2", "3", "4", "5", "6", "7", str(tmp_path / "run.yaml"), "command line"])
    numbers = [int(line) for line in lines if line.isdecimal()]
    assert numbers == [2, 3, 4, 5, 6, 7]
    assert any(problem.what.startswith("data") and "missing" in problem.what for problem in problems)


@pytest.mark.parametrize(
    ("line", "what", "choices"),
    [
        ("nodes: many", "nodes: must be a whole number", ()),
        ("nodes: 1.5", "nodes: must be a whole number", ()),
        ("nodes: 0", "nodes: must be greater than or equal to 1", ()),
        ("learning_rate: fast", "learning_rate: must be a number", ()),
        ("learning_rate: .inf", "learning_rate: must be a finite number", ()),
        ("learning_rate: .nan", "learning_rate: must be a finite number", ()),
        ("learning_rate: true", "learning_rate: needs a value", ()),
        ("lora_rank: false", "lora_rank: needs a value, not false", ()),
        ("global_batch_size: true", "global_batch_size: needs a value, not true", ()),
        (f"name: {'x' * 300}", "name: is longer than 64 characters", ()),
        ("name: a b", "name: has characters that may not stand here", ()),
        ("packing: perhaps", "packing: no such value", ("true", "false")),
        ("tuner_type: lorra", "tuner_type: no such value", ("lora", "full")),
        ("system: 3", "system: must be text", ()),
        ("nodes: {a: 1}", "nodes: must be a whole number", ()),
        ("nodes: [1, 2]", "nodes: must be a whole number", ()),
        ("target_modules: {a: 1}", "target_modules: must be a list", ()),
        ("per_device_train_batch_size: some", "per_device_train_batch_size: must be a whole number or auto", ()),
        ("torch_compile: maybe", "torch_compile: no such value", ("auto", "true", "false")),
        ("seed: 99999999999999999999", "seed: must be below 2^53", ()),
        ("dataset_num_proc: 1000", "dataset_num_proc: must be less than or equal to 256", ()),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_the_value(
    tmp_path: Path, line: str, what: str, choices: tuple[str, ...]
) -> None:
    problem = only(complaints(write(tmp_path, f"{WHOLE}{line}\n")))
    assert problem.where.endswith("run.yaml:3")
    assert problem.what.startswith(what)
    assert problem.choices == choices
    assert problem.value or "true" in line


def test_a_near_value_is_offered(tmp_path: Path) -> None:
    assert only(complaints(write(tmp_path, WHOLE + "tuner_type: lorra\n"))).hint == "did you mean lora?"


def test_a_number_where_text_belongs_is_told_to_take_quotes(tmp_path: Path) -> None:
    problem = only(complaints(write(tmp_path, WHOLE + "account: 0123\n")))
    assert problem.hint == 'put it in quotes: account: "…"'


def test_a_key_given_twice_in_one_section_is_refused_at_the_second(tmp_path: Path) -> None:
    problem = only(complaints(write(tmp_path, WHOLE + "train:\n  seed: 1\n  seed: 2\n")))
    assert problem.where.endswith(":5")
    assert "duplicate key" in problem.what


def test_a_key_given_on_top_and_in_its_section_is_refused_with_both_places(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "seed: 1\ntrain:\n  seed: 2\n")
    problem = only(complaints(file))
    assert problem.where == f"{file}:5"
    assert f"{file}:3" in problem.what


def test_a_key_in_two_spellings_that_differ_is_refused_with_both_values(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "learning_rate: 1e-4\nlr: 1e-5\n")
    problem = only(complaints(file))
    assert problem.what == f"lr: contradicts learning_rate: 0.0001 at {file}:3"
    assert (problem.where, problem.value) == (f"{file}:4", "1e-05")


@pytest.mark.parametrize(
    "line",
    [
        "name: !!python/object/apply:os.system [id]",
        "name: !secret x",
        "train: !thing {seed: 1}",
        "target_modules: !!set {q_proj, k_proj}",
        "system: !!binary aGVsbG8=",
        "name: 2024-01-01",
    ],
)
def test_yaml_tags_and_dates_are_refused_and_nothing_is_built_from_them(tmp_path: Path, line: str) -> None:
    problems = complaints(write(tmp_path, f"{WHOLE}{line}\n"))
    assert problems[0].where.endswith("run.yaml:3")
    assert "tags" in problems[0].what


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: m\n  dataset: a\n", 2),
        ("model: [m\n", 2),
        ("a: b: c\n", 1),
        ("\tmodel: m\n", 1),
        ("model: m\n---\nmodel: n\n", 2),
        ("model: *nowhere\n", 1),
        ("? [a, b]\n: c\n}\n", 3),
    ],
)
def test_broken_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    problem = only(complaints(write(tmp_path, text)))
    assert problem.what.startswith("not valid YAML")
    assert problem.where.endswith(f"run.yaml:{line}")
    there = text.splitlines()[line - 1 : line]
    assert str(problem.value or "") == (there[0].replace("\t", "\\t") if there else "")


def test_a_second_colon_in_a_line_is_told_what_it_may_be(tmp_path: Path) -> None:
    problem = only(complaints(write(tmp_path, "model:\n  model: m\n   dtype: bfloat16\n")))
    assert (problem.value, problem.where.rpartition(":")[2]) == ("   dtype: bfloat16", "3")
    assert "indented alike" in problem.hint


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- list\n", "just words\n", "42\n"])
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    problem = only(complaints(write(tmp_path, text)))
    assert problem.what == "holds no keys"
    assert "hpcft init" in problem.hint


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("train:\n\tseed: 1\n", "found character '\\t'", "lines are indented with spaces, not with tabs"),
        ("train:\n  system: a\0b\n", "a character that may not stand in it, \\x00", "remove it"),
        ("a: 1\ntrain: &a {max_steps: *a}\n", "an anchor stands inside of itself", "write its value out"),
        ("a: 1\ndataset: &a [{path: *a}]\n", "an anchor stands inside of itself", "write its value out"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line_and_what_to_do(tmp_path: Path, text: str, what: str, hint: str) -> None:
    problem = only(complaints(write(tmp_path, text)))
    assert (problem.where[-2:], problem.hint) == (":2", hint)
    assert what in problem.what
    assert "\n" not in problem.what


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: m\nsystem: \xe9\xe8\n")
    problem = only(complaints(str(tmp_path / "run.yaml")))
    assert (problem.what, problem.where[-2:]) == ("not UTF-8 text", ":2")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert load_run([str(tmp_path / "run.yaml")]).run.model.model == "m"


def test_a_missing_file_is_refused_without_calling_its_keys_missing_too(tmp_path: Path) -> None:
    problem = only(complaints(str(tmp_path / "none.yaml")))
    assert problem.where.endswith("none.yaml")
    assert "No such file" in problem.what


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "directory" in only(complaints(str(tmp_path))).what


def test_a_missing_file_does_not_hide_what_is_wrong_on_the_command_line() -> None:
    assert {p.where for p in complaints("none.yaml", "--zzz", "1")} == {"none.yaml", "command line"}


def test_an_anchor_inside_itself_and_a_bomb_of_anchors_are_refused(tmp_path: Path) -> None:
    assert complaints(write(tmp_path, WHOLE + "val_dataset: &x [*x]\n"))
    assert "nested deeper" in complaints(write(tmp_path, WHOLE + "val_dataset: [[[[[[[a]]]]]]]\n"))[0].what
    bomb = "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'lol'}]\n" for i in range(9))
    assert complaints(write(tmp_path, WHOLE + bomb))


def test_brackets_without_end_are_refused(tmp_path: Path) -> None:
    problem = only(complaints(write(tmp_path, "model: " + "[" * 2_000)))
    assert problem.what.startswith("not valid YAML")


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "train: &t\n  seed: 7\nslurm:\n  nodes: 2\n")
    assert load_run([file]).run.train.seed == 7


def test_an_anchor_that_is_given_anew_is_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = load_run([write(tmp_path, "model: &a m\ndataset: &a d\nval_dataset: *a\n")]).run
    assert run.data.val_dataset == ("d",)


def test_a_terminal_escape_in_a_key_or_value_never_reaches_the_terminal(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + '"\\e[31mred\\nkey": "\\e[2J"\n')
    text = "\n".join(map(str, complaints(file)))
    assert "\x1b" not in text
    assert "\\x1b[31mred\\nkey" in text


def test_what_is_missing_is_said_with_an_example(tmp_path: Path) -> None:
    problems = complaints(write(tmp_path, "name: x\n"))
    assert [p.what for p in problems] == ["model: missing", "data: missing"]
    assert all(p.where.endswith("run.yaml") and p.hint.startswith("add ") for p in problems)


def test_a_key_with_nothing_behind_it_is_as_if_not_said(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "seed:\nmax_steps:\nlearning_rate:\ntrain:\n")
    assert load_run([file]).run.train.seed == 42


def test_an_unknown_key_with_nothing_behind_it_is_noted(tmp_path: Path) -> None:
    loaded = load_run([write(tmp_path, WHOLE + "leerning_rate:\n")])
    assert loaded.notes == ("leerning_rate is no key, and nothing stands behind it",)


def test_what_axolotls_own_files_leave_empty_or_off_is_no_obstacle(tmp_path: Path) -> None:
    empty = ("wandb_project", "wandb_watch", "wandb_name", "debug", "local_rank", "xformers_attention", "s2_attention",
             "lora_fan_in_fan_out", "eval_table_size", "eval_max_new_tokens", "deepspeed", "fsdp", "fsdp_config",
             "special_tokens", "resume_from_checkpoint", "early_stopping_patience", "lora_target_modules")  # fmt: skip
    text = "base_model: m\ndatasets:\n  - path: a.jsonl\n    type: alpaca\nstrict: false\nload_in_8bit: false\n"
    text += "shuffle_merged_datasets: true\nlora_target_linear: true\n"
    loaded = load_run([write(tmp_path, text + "".join(f"{key}:\n" for key in empty))])
    assert loaded.notes == ()
    assert loaded.run.tuner.target_modules == ("all-linear",)


def test_extends_lays_the_nearer_file_over_the_farther_and_keeps_each_values_origin(tmp_path: Path) -> None:
    write(tmp_path, WHOLE + "seed: 1\nmax_steps: 10\nnodes: 2\n", "far.yaml")
    write(tmp_path, "extends: far.yaml\nlr: 1e-3\nseed: 2\n", "near.yaml")
    file = write(tmp_path, "extends: near.yaml\nseed: 3\n")
    loaded = load_run([file, "--max_steps", "20"])
    assert (loaded.run.train.seed, loaded.run.train.max_steps, loaded.run.slurm.nodes) == (3, 20, 2)
    assert loaded.origins["seed"] == f"{file}:2"
    assert loaded.origins["learning_rate"] == f"{tmp_path / 'near.yaml'}:2"
    assert loaded.origins["model"] == f"{tmp_path / 'far.yaml'}:1"
    assert loaded.origins["max_steps"] == "command line"
    assert loaded.origins["weight_decay"] == "default"


def test_a_nearer_file_may_use_another_spelling_than_the_farther(tmp_path: Path) -> None:
    write(tmp_path, WHOLE + "lr: 1e-3\n", "far.yaml")
    file = write(tmp_path, "extends: far.yaml\nlearning_rate: 2e-3\n")
    assert load_run([file]).run.train.learning_rate == 2e-3


def test_extends_takes_several_files_the_later_over_the_earlier(tmp_path: Path) -> None:
    write(tmp_path, WHOLE + "seed: 1\nnodes: 2\n", "a.yaml")
    write(tmp_path, "seed: 2\n", "b.yaml")
    loaded = load_run([write(tmp_path, "extends: [a.yaml, b.yaml]\n")])
    assert (loaded.run.train.seed, loaded.run.slurm.nodes) == (2, 2)


def test_extends_that_goes_in_a_circle_is_refused_where_it_closes(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    problem = only(complaints(str(tmp_path / "a.yaml")))
    assert problem.what == "extends: goes in a circle"
    assert problem.where == f"{tmp_path / 'b.yaml'}:1"


def test_extends_of_a_missing_file_is_refused_at_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE + "extends: gone.yaml\n")
    problem = only(complaints(file))
    assert (problem.where, problem.value) == (f"{file}:3", "gone.yaml")


def test_what_stands_in_a_missing_base_is_not_missing_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    first, second = complaints(write(tmp_path, "extends: gone.yaml\nseed: x\n"))
    assert (first.what, second.what) == ("extends: no such file", "seed: must be a whole number")


def test_lists_may_be_written_as_one_line_with_commas(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\ndataset: a.jsonl, b.jsonl#5\ntarget_modules: q_proj,v_proj\n")
    run = load_run([file]).run
    assert run.data.dataset == ("a.jsonl", "b.jsonl#5")
    assert run.tuner.target_modules == ("q_proj", "v_proj")


def test_datasets_may_be_maps(tmp_path: Path) -> None:
    maps = "  - {path: own/er, name: en, type: alpaca, split: train}\n  - {path: b.jsonl, rows: 7}\n"
    text = f"model: m\ndatasets:\n{maps}"
    assert load_run([write(tmp_path, text)]).run.data.dataset == ("own/er:en", "b.jsonl#7")
    none = text.replace("rows: 7", "rows: 0")  # as #0, which is refused, and not as all rows
    assert load_run([write(tmp_path, none)]).run.data.dataset == ("own/er:en", "b.jsonl#0")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{type: alpaca}", "a dataset needs a path"),
        ("{path: a, split: test}", "a dataset has no split here"),
        ("{path: json, data_files: a.jsonl}", "a dataset has no data_files here"),
        ("{path: a, dataset_name: b}", "a dataset's path and dataset_name are the same"),
        ("{path: a, type: {field: x}}", "a dataset has no type here"),
    ],
)
def test_a_dataset_map_that_means_something_else_is_refused_at_its_line(tmp_path: Path, entry: str, what: str) -> None:
    problem = only(complaints(write(tmp_path, f"model: m\ndatasets: [{entry}]\n")))
    assert (problem.what, problem.where[-2:]) == (what, ":2")


def test_a_name_that_reads_like_a_hubs_is_the_folder_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "mine").write_text("{}")
    run = load_run(["--model", "models/tiny", "--dataset", "records/mine#5", "some/other"]).run
    assert run.model.model == "./models/tiny"
    assert run.data.dataset == ("./records/mine#5", "some/other")
