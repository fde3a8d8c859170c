"""Every strategy gives one process's losses and gradient norms, and resumes what any other has saved.

`make equivalence` and `make resume-matrix` try everything; here is what `make test` has time for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import Refusal
from hpcft.run.paths import RunPaths
from hpcft.train.head import Head
from hpcft.train.wide_sum import WideSum
from tests.train import equivalence, families, small
from tests.train.equivalence import TOLERANCE, Curve, difference, trained
from tests.train.resume_matrix import Matrix

LAYOUTS = [name for name in families.LAYOUTS if name != "one process"]
PREPARED = small.Prepared(small.windows(22))


class Alone:
    """Models, and what one process makes of them, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curves: dict[tuple[str, str], Curve] = {}

    def model(self, family: str) -> Path:
        place = self.folder / family
        return place if place.exists() else families.save(place, family)

    def curve(self, family: str, kind: str) -> Curve:
        if (family, kind) not in self.curves:
            plan = families.plan_for(self.model(family), "one process", kind)
            self.curves[family, kind] = trained(plan, self.folder / f"{family}-{kind}", PREPARED)
        return self.curves[family, kind]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strategy_gives_the_losses_and_norms_of_one_process(
    alone: Alone, tmp_path: Path, layout: str, kind: str
) -> None:
    here = trained(families.plan_for(alone.model("llama"), layout, kind), tmp_path, PREPARED)
    assert difference(here, alone.curve("llama", kind)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", "FSDP2×TP"),  # biases, tied embeddings, a vocabulary that two ranks do not divide
        ("qwen3", "TP"),  # norms on queries and keys
        ("gemma2", "DDP×TP"),  # soft caps, norms behind the sums
        ("phi", "TP"),  # biases behind row-parallel linears and in the head
        ("phi3", "FSDP2×TP"),  # fused projections
    ],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_models_with_peculiarities_are_cut_right(
    alone: Alone, tmp_path: Path, family: str, layout: str, kind: str
) -> None:
    here = trained(families.plan_for(alone.model(family), layout, kind), tmp_path, PREPARED)
    assert difference(here, alone.curve(family, kind)) < TOLERANCE


@pytest.mark.parametrize("policy", [pytest.param("selective", marks=pytest.mark.campaign), "full"])
@pytest.mark.parametrize("layout", ["FSDP2", "FSDP2×TP", "ZeRO-3"])
def test_recomputation_changes_nothing(alone: Alone, tmp_path: Path, layout: str, policy: str) -> None:
    plan = families.plan_for(alone.model("llama"), layout, "lora", train={"recomputation": policy})
    assert difference(trained(plan, tmp_path, PREPARED), alone.curve("llama", "lora")) < TOLERANCE


@pytest.mark.parametrize(
    ("strategy", "degrees"),
    [
        ("zero2_offload", {"dp": 2}),
        ("zero3_offload", {"dp": 2}),
        ("fsdp_offload", {"dp": 2}),
        ("fsdp_offload", {"dp": 2, "tp": 2}),
    ],
)
def test_offload_changes_nothing(alone: Alone, tmp_path: Path, strategy: str, degrees: dict[str, int]) -> None:
    plan = families.plan_with(alone.model("llama"), strategy, degrees)
    assert difference(trained(plan, tmp_path, PREPARED), alone.curve("llama", "full")) < TOLERANCE


@pytest.mark.parametrize("layout", ["FSDP2", "HSDP", "FSDP2×TP"])
def test_weights_that_stay_gathered_change_nothing_and_are_new_after_a_step_and_a_load(
    alone: Alone, tmp_path: Path, layout: str
) -> None:
    plan = families.plan_for(
        alone.model("llama"), layout, train={"resharding": False}, checkpoint={"save_steps": 1, "keep": 3}
    )
    whole = trained(plan, tmp_path, PREPARED)
    assert difference(whole, alone.curve("llama", "full")) < TOLERANCE
    goes_on = families.plan_for(
        alone.model("llama"), layout, train={"resharding": False},
        checkpoint={"resume": str(RunPaths(tmp_path).checkpoint(1))},
    )  # fmt: skip
    assert difference(trained(goes_on, tmp_path / "on", PREPARED), whole[1:]) < TOLERANCE


@pytest.mark.parametrize("at_once", [True, False], ids=["each chunk once", "again in the backward pass"])
def test_a_head_that_is_gone_through_in_chunks_sends_its_gradient_once(
    alone: Alone, tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, send = tmp_path / "calls", WideSum.__call__

    def counted(unit: WideSum, *given: Any, **named: Any) -> None:
        with calls.open("a") as file:
            file.write(".")
        send(unit, *given, **named)

    monkeypatch.setattr(WideSum, "__call__", counted)
    monkeypatch.setattr(Head, "_at_once", lambda head, hidden: at_once)
    plan = families.plan_with(
        alone.model("llama"), "fsdp", {"dp": 2}, model={"dtype": "bfloat16"}, train={"loss_chunk": 3},
        optim={"max_steps": 1},
    )  # fmt: skip
    trained(plan, tmp_path / "run", PREPARED)
    units = 2 + 1 + 1 + 1  # layers, embedding, head, norm
    assert len(calls.read_text()) == 2 * plan.batch.accumulation * units


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_in_bfloat16_many_micro_batches_are_added_up_in_float32(
    alone: Alone, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under zero3 the head rounds gradients after they were scaled, elsewhere before; that is not what is compared.
    monkeypatch.setattr(Head, "_at_once", lambda head, hidden: strategy != "zero3")

    def curve(name: str) -> Curve:
        batch = {"global_windows": 64, "micro_windows": 1}
        how = {"dtype": "bfloat16"}
        plan = families.plan_with(alone.model("llama"), name, {"dp": 2}, batch=batch, model=how, optim={"max_steps": 1})
        return trained(plan, tmp_path / name, small.Prepared(small.windows(64)))

    assert difference(curve(strategy), curve("ddp")) < 1e-6


@pytest.mark.parametrize("layout", ["FSDP2×TP", "ZeRO-2", pytest.param("ZeRO-3", marks=pytest.mark.campaign)])
@pytest.mark.parametrize(("kind", "dtype", "allowed"), [("full", "float32", TOLERANCE), ("lora", "bfloat16", 5e-3)])
def test_weights_that_rank_0_makes_are_those_of_one_process(
    alone: Alone, tmp_path: Path, layout: str, kind: str, dtype: str, allowed: float
) -> None:
    """Random ones, and adapters that are taken out of the weights they sit on."""

    def curve(name: str) -> Curve:
        made = {"from_scratch": kind == "full", "dtype": dtype}
        tuner = {"init_lora_weights": "pissa_niter_4" if kind == "lora" else "true"}
        plan = families.plan_for(alone.model("llama"), name, kind, model=made, tuner={"kind": kind, **tuner})
        return trained(plan, tmp_path / name, PREPARED)

    assert difference(curve(layout), curve("one process")) < allowed


def test_the_comparison_sees_a_step_that_was_taken_otherwise(alone: Alone, tmp_path: Path) -> None:
    plan = families.plan_for(alone.model("llama"), "DDP", optim={"learning_rate": 1.01e-3})
    assert difference(trained(plan, tmp_path, PREPARED), alone.curve("llama", "full")) > TOLERANCE


@pytest.mark.parametrize(
    ("kind", "saved", "resumed", "ranks"),
    [
        ("full", "ZeRO-3", "FSDP2", (3, 2)),
        ("full", "FSDP2", "TP", (3, 2)),
        ("full", "TP", "ZeRO-2", (4, 3)),
        ("full", "ZeRO-2", "ZeRO-3", (4, 2)),
        ("lora", "FSDP2×TP", "ZeRO-1", (4, 2)),
        ("lora", "HSDP", "DDP×TP", (4, 4)),
        ("lora", "DDP", "FSDP2×TP", (2, 4)),
        ("lora", "FSDP2", "FSDP2", (4, 4)),
        ("lora", "TP", "TP", (2, 2)),
        ("lora", "ZeRO-3", "ZeRO-3", (2, 2)),
    ],
)
def test_what_one_strategy_saved_another_resumes(
    matrix: Matrix, kind: str, saved: str, resumed: str, ranks: tuple[int, int]
) -> None:
    assert matrix.cell(kind, saved, resumed, ranks).difference < TOLERANCE


def test_a_model_that_has_no_plan_for_it_is_not_cut(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from hpcft.train.tensor_parallel import _styled

    config = GPT2Config(vocab_size=small.VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(Refusal, match="no tensor-parallel plan"):
        _styled(GPT2LMHeadModel(config).transformer)


def test_queries_that_are_normalised_over_all_heads_are_not_cut() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from hpcft.train.tensor_parallel import _styled

    config = Olmo2Config(
        vocab_size=small.VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(Refusal, match="over all heads together"):
        _styled(Olmo2ForCausalLM(config).model)


def test_the_table_has_a_column_for_each_layout() -> None:
    rows = [equivalence.Row("llama", "full", layout, 1e-7) for layout in ("DDP", "TP")]
    assert equivalence.table(rows).splitlines()[2] == "| llama, full | 1e-07 | 1e-07 |"
