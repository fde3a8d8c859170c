"""A person sees what is trained, where it came from, and nothing that moves the cursor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.data.inspect import main
from hpcft.data.prepare import prepare
from tests.data.conftest import Tokenizers
from tests.data.small import chat, request, write_lines
from tests.plans import plan

ROWS = [chat("what ?", f"the answer \x1b[31m{n}") for n in range(3)]


@pytest.fixture
def words(tmp_path: Path, tokenizer: Tokenizers) -> list[str]:
    data = request(write_lines(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer(), packing=False)
    prepare(data, tmp_path / "store")
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    return ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]


def test_a_window_is_shown_with_its_trained_tokens_marked_and_its_source(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--index", "1"]) == 0
    shown = capsys.readouterr().out
    assert "train window 1 of 3" in shown
    assert "a.jsonl:2 · messages · " in shown
    assert "<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\n⟦the answer " in shown
    assert "1<|im_end|>⟧\n" in shown


def test_escapes_in_the_data_are_spelt_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[31m" in shown


def test_windows_are_shown_at_random_and_never_more_than_there_are(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--random", "9", "--windows"]) == 0
    assert capsys.readouterr().out.count("train window") == 3


def test_records_are_shown_at_random_each_by_itself_and_the_same_ones_for_a_seed(
    tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat(f"what is {n} ?", f"the answer {n}") for n in range(30)]
    data = request(write_lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizer())
    prepare(data, tmp_path / "store")
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    words = ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store"), "--random", "2"]
    shown = []
    for seed in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], []):
        assert main([*words, *seed]) == 0
        out, err = capsys.readouterr()
        assert (out.count("⟦the answer "), out.count("<|im_end|>⟧"), out.count("── ")) == (2, 2, 2)
        assert "train window" not in out
        shown.append((out, err))
    assert shown[0] == shown[1] != shown[2]
    again = shown[3][1].split("--seed ")[1].split()[0]
    assert main([*words, "--seed", again]) == 0
    assert capsys.readouterr().out == shown[3][0]


def test_both_answers_of_a_random_pair_are_shown(
    tmp_path: Path, tokenizer: Tokenizers, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"what is {n} ?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(9)]
    data = request(write_lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizer(), rows="pair")
    prepare(data, tmp_path / "store")
    (tmp_path / "plan.json").write_text(plan(data=data).to_json())
    words = ["--plan", str(tmp_path / "plan.json"), "--store", str(tmp_path / "store")]
    assert main([*words, "--random", "1", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    [number] = {line.partition("⟦good ")[2][0] for line in shown.splitlines() if "⟦good " in line}
    assert f"⟦bad {number}<|im_end|>⟧" in shown
    assert (" · chosen · " in shown, " · rejected · " in shown) == (True, True)


@pytest.mark.parametrize("wrong", [["--index", "3"], ["--split", "validation"], ["--split", "tset"]])
def test_what_is_not_there_is_refused_with_what_is(
    wrong: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *wrong]) == 2
    assert "valid: " in capsys.readouterr().err


def test_reading_shards_brings_neither_torch_nor_transformers_nor_pyarrow() -> None:
    code = (
        "import sys, hpcft.data.shards\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'pyarrow', 'pydantic', 'jinja2') "
        "if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_asking_the_store_takes_the_standard_library_alone() -> None:
    code = "import sys, hpcft.data.store; print('numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
