"""Thousands of hostile names and values: each is a Plan or a Refusal, never another exception, and nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcft.config.aliases import ALIASES, SHARDING, SWITCHES
from hpcft.config.declined import REFUSED, SET_ASIDE
from hpcft.config.leaves import leaf_sections
from hpcft.config.load import load_run
from hpcft.errors import Refusal
from hpcft.plan.explain import explain
from hpcft.plan.make import make_plan
from hpcft.plan.plan import Plan
from tests.words import PROFILES, profile

KEYS = [
    *leaf_sections(),
    *ALIASES,
    *SWITCHES,
    *SET_ASIDE,
    *SHARDING,
    *REFUSED,
    "extends",
    "config",
    "train",
    "data",
    "model",
]
VALUES = [
    *("", " ", "null", "None", "true", "false", "yes", "0", "1", "-1", "2", "3", "7", "1e-4", "1e308", "1e999", "-0.0"),
    *("nan", ".inf", "inf", "0x10", "1_000", "9" * 30, "9" * 5000, "1" * 400, "١٢", "½", "1,2,3", "[1, 2]", "[[", "{}"),
    *('{"path": "a"}', '[{"path": 1}]', '[{"rows": []}]', "[null]", "auto", "all", "lora", "full", "cosine", "epoch"),
    *("a.jsonl", "a.jsonl#5", "a#", "a##", "#5", "a#-1", "a#1.5", "a#" + "9" * 50, "own/er", "own/er:sub#5", "MS::a/b"),
    *("HF::", "a:b:c", "../../etc/passwd", "/dev/null", "~", "$HOME", "${X:-y}", "a" * 5000, "x/" * 3000, "..", "."),
    *("two words", "it's", 'a"b', "a\\b", "a;id", "$(id)", "`id`", "a\nb", "a\n#SBATCH --x", "a\rb", "tab\t", "\x00"),
    *(
        "\x1b[31m",
        "\x7f",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "\udcff",
        "🦜",
        "Grüße",
        "{{ x }}",
        "{% raw %}",
        "%s%n",
    ),
    *(
        "1:2:3:4",
        "99-99:99",
        "4:00:00",
        "1h",
        "1d2h",
        "-",
        "--",
        "---",
        "=",
        "a=b",
        "!!python/object:os.system",
        "*a",
        "&a",
    ),
    *("zero3", "zerro", "dpo", "bfloat16", "fp8", "infiniband-h100", "local", "gpu", "nosuch"),
    *("zero2_offload", "full_shard auto_wrap", "fsdp2", "hybrid_shard", '{"zero_optimization": {"stage": 3}}'),
    *('{"fp16": 1e999}', '{"a": {"a": 1}}', '{"zero_optimization": []}', '{"fsdp_config": 1}', "fsdp", "zero1"),
]


def mangled(random_: random.Random, word: str) -> str:
    """``word`` as it is, or with something done to it."""
    changes: list[Callable[[str], str]] = [
        str,
        str,
        str,
        lambda w: w.replace("_", "-"),
        lambda w: f"train.{w}",
        str.upper,
        lambda w: w[1:],
        lambda w: w + random_.choice("_.-=\n\x00\x1b é"),
    ]
    return random_.choice(changes)(word)


def sound(plan: Plan) -> None:
    """What holds for every Plan, however it came about."""
    assert Plan.from_json(plan.to_json()) == plan
    page = explain(plan, None, {})
    assert "\x1b" not in page
    assert plan.batch.micro_windows * plan.batch.accumulation * plan.layout.data_parallel == plan.batch.global_windows
    for text in (plan.name, plan.resources.partition, plan.resources.account, plan.resources.constraint):
        assert text is None or (text.isprintable() and " " not in text)


def tried(words: list[str], cluster: str) -> bool:
    """Whether the words give a Plan; False for a Refusal that a person can read."""
    try:
        loaded = load_run(words)
        plan = make_plan(loaded.run, profile(cluster), loaded.origins)
    except Refusal as caught:
        refusal = caught
    else:
        sound(plan)
        return True
    assert refusal.problems
    assert all(problem.what for problem in refusal.problems)
    assert all(character.isprintable() or character == "\n" for character in str(refusal))
    return False


@pytest.mark.parametrize("seed", range(4))
def test_hostile_command_lines_are_planned_or_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_ = random.Random(seed)
    planned = 0
    for _ in range(400):
        words = ["--model", "m", "--dataset", "a.jsonl"] if random_.random() < 0.7 else []
        for _ in range(random_.choice([1, 1, 1, 2, 5])):
            key, value = mangled(random_, random_.choice(KEYS)), random_.choice(VALUES)
            words += random_.choice(
                [[f"--{key}", value], [f"--{key}={value}"], [f"{key}={value}"], [f"--{key}"], [value]]
            )
        planned += tried(words, random_.choice(PROFILES))
    assert planned > 20, "the fuzz must get past the first gate often enough to try what lies behind it"


@pytest.mark.parametrize("seed", range(4))
def test_hostile_files_are_planned_or_refused(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_ = random.Random(100 + seed)
    file = tmp_path / "run.yaml"
    planned = 0
    for _ in range(150):
        lines = ["model: m", "dataset: a.jsonl"] if random_.random() < 0.7 else []
        for _ in range(random_.choice([1, 1, 2])):
            key, value = mangled(random_, random_.choice(KEYS)), random_.choice(VALUES)
            if random_.random() < 0.5:
                value = repr(value) if random_.random() < 0.5 else f'"{value}"'
            lines.append(
                random_.choice([f"{key}: {value}", f"train:\n  {key}: {value}", f"- {value}", f"{key}:\n - {value}"])
            )
        file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape" if random_.random() < 0.9 else "replace")
                         if "\ud800" not in "".join(lines) else b"model: \xed\xa0\x80")  # fmt: skip
        planned += tried([str(file)], random_.choice(PROFILES))
    assert planned > 0


@pytest.mark.parametrize("seed", range(2))
def test_files_of_noise_are_refused(seed: int, tmp_path: Path) -> None:
    random_ = random.Random(200 + seed)
    file = tmp_path / "run.yaml"
    for _ in range(100):
        alphabet = b"abc: -[]{}#&*!|>'\"%@`,?\n\n\t \\\x00\xff\xc3" if random_.random() < 0.7 else bytes(range(256))
        file.write_bytes(bytes(random_.choice(alphabet) for _ in range(random_.randrange(1, 60))))
        assert not tried([str(file)], "local")
