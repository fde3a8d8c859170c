"""What a rank imports before its first step, and how long each part of its start took."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcft.run.ledger import Ledger, read_events
from hpcft.run.paths import RunPaths
from hpcft.train.libraries import absent
from hpcft.train.timeline import Timeline, age
from tests import plans

# What no rank of such a run has a use for; what transformers brings by itself is not ours to leave out.
UNUSED = {
    "full": ("peft", "bitsandbytes", "tensorboard", "pydantic", "deepspeed", "datasets", "transformers.trainer"),
    "lora": (
        "bitsandbytes",
        "torch._inductor.compile_fx",
        "tensorboard",
        "pydantic",
        "deepspeed",
        "transformers.trainer",
    ),
}
IMPORTS = """
import sys
from hpcft.train import assemble, libraries, loop, world
from hpcft.train.adapters import add_adapters
from hpcft.plan.plan import Plan
plan = Plan.from_json(open(sys.argv[1]).read())
libraries.import_libraries(plan)
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1))
if plan.tuner.kind == "lora":
    add_adapters(model, plan.tuner, 0)
print(*sys.modules)
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_rank_imports_nothing_heavy_that_it_does_not_use(kind: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plans.plan(tuner={"kind": kind}).to_json())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS, tmp_path / "plan.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "transformers.models.qwen2.modeling_qwen2" in loaded
    assert ("peft" in loaded) == (kind == "lora")
    assert not [name for name in UNUSED[kind] if name in loaded]


def test_a_package_is_absent_only_meanwhile_and_only_where_it_was_not_there() -> None:
    sys.modules.pop("colorsys", None)
    with absent("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with absent("colorsys"):
        import colorsys as again
    assert again is colorsys


def test_the_phases_of_a_start_add_up_to_its_time(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    before = age()
    clock = Timeline(Ledger(paths, "rank-0003", {}), 3)
    time.sleep(0.2)
    clock("weights", 0.15)
    clock("strategy")
    after = age()
    assert list(clock.phases) == ["python", "weights", "strategy"]
    assert clock.phases["weights"] == 0.15
    assert before + 0.18 < sum(clock.phases.values()) < after + 0.02
    assert clock.phases["strategy"] >= 0.04
    assert [(event["rank"], event["name"]) for event in read_events(paths)] == [
        (3, "python"), (3, "weights"), (3, "strategy")
    ]  # fmt: skip


def test_the_age_of_a_process_is_counted_from_its_start() -> None:
    program = "import time; time.sleep(0.3); from hpcft.train.timeline import age; print(age())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) < 20
