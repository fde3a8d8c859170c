"""Every strategy gives one process's losses and gradient norms, and resumes what any other has saved.

`make equivalence` and `make resume-matrix` try everything; here is what `make test` has time for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hpcft.errors import Refusal
from hpcft.run.paths import RunPaths
from hpcft.train import adamw
from hpcft.train.copy_engines import Buffers
from hpcft.train.head import Head
from hpcft.train.reduce_scatter import AllToAllReduceScatter
from hpcft.train.strategies import fsdp, zero
from tests.train import equivalence, families, small
from tests.train.equivalence import TOLERANCE, Curve, difference, trained
from tests.train.resume_matrix import Matrix
from tests.train.test_copy_engines import replace_symmetric_memory

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
    sums = counted(monkeypatch, AllToAllReduceScatter, "__call__", tmp_path / "sums")
    chunks = counted(monkeypatch, Head, "_scores", tmp_path / "chunks")
    monkeypatch.setattr(Head, "_at_once", lambda head, hidden: at_once)
    plan = families.plan_with(
        alone.model("llama"), "fsdp", {"dp": 2}, model={"dtype": "bfloat16"}, train={"loss_chunk": 3},
        optim={"max_steps": 1},
    )  # fmt: skip
    trained(plan, tmp_path / "run", PREPARED)
    passes, units = 2 * plan.batch.accumulation, 2 + 1 + 1 + 1  # layers, embedding, head, norm
    assert len(sums.read_text()) == passes * units
    assert len(chunks.read_text()) > 4 * passes


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, file: Path) -> Path:
    """``file`` gets a dot for each call, on whichever rank."""
    function = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        with file.open("a") as dots:
            dots.write(".")
        return function(*given, **named)

    monkeypatch.setattr(owner, name, called)
    return file


@pytest.mark.parametrize(
    ("strategy", "degrees", "how"),
    [
        ("fsdp", {"dp_replicate": 2, "dp": 2}, {"dtype": "float16"}),
        ("fsdp", {"dp": 2, "tp": 2}, {"dtype": "bfloat16"}),
        ("fsdp", {"dp": 2}, {"dtype": "bfloat16", "main_params_dtype": "bfloat16"}),
        ("fsdp_offload", {"dp": 2}, {"dtype": "bfloat16"}),
    ],
)
def test_gradients_sent_in_two_bytes_give_the_curve_of_those_sent_in_four(
    alone: Alone, tmp_path: Path, strategy: str, degrees: dict[str, int], how: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sums = counted(monkeypatch, AllToAllReduceScatter, "__call__", tmp_path / "sums")
    plan = families.plan_with(alone.model("llama"), strategy, degrees, model=how)
    narrow = trained(plan, tmp_path / "narrow", PREPARED)
    seen = sums.read_text()
    monkeypatch.setattr(fsdp, "sends_narrow", lambda plan: False)
    assert difference(trained(plan, tmp_path / "wide", PREPARED), narrow) < 1e-6
    assert sums.read_text() == seen
    assert seen


@pytest.mark.parametrize(
    ("kind", "degrees", "resharding"),
    [
        ("full", {"dp": 2}, False),
        ("full", {"dp": 3}, True),
        ("full", {"dp_replicate": 2, "dp": 2}, True),
        ("full", {"dp": 2, "tp": 2}, False),
        ("lora", {"dp": 2}, True),
    ],
)
def test_layers_that_ranks_copy_from_each_other_give_the_curve_of_those_sent(
    alone: Alone, tmp_path: Path, kind: str, degrees: dict[str, int], resharding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = families.plan_with(
        alone.model("llama"), "fsdp", degrees, kind, model={"dtype": "bfloat16"}, train={"resharding": resharding}
    )
    sent = trained(plan, tmp_path / "sent", PREPARED)
    reads = counted(monkeypatch, Buffers, "read", tmp_path / "reads")
    replace_symmetric_memory(monkeypatch, tmp_path)
    assert difference(trained(plan, tmp_path / "copied", PREPARED), sent) < 1e-6
    assert reads.read_text()


def test_a_layer_that_was_fetched_and_not_used_is_not_taken_for_what_lies_in_its_buffer_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backward pass ends at the last of five layers and has fetched the one below; the next micro batch needs it.
    monkeypatch.setitem(families.SIZES, "num_hidden_layers", 5)
    plan = families.plan_with(
        families.save(tmp_path / "model", "llama"), "fsdp", {"dp": 2}, "lora", model={"dtype": "bfloat16"},
        tuner={"target_modules": ("4.self_attn.q_proj",)}, train={"resharding": True},
        batch={"global_windows": 8, "micro_windows": 1},
    )  # fmt: skip
    assert plan.batch.accumulation > 1
    sent = trained(plan, tmp_path / "sent", PREPARED)
    replace_symmetric_memory(monkeypatch, tmp_path)
    assert difference(trained(plan, tmp_path / "copied", PREPARED), sent) < 1e-6


@pytest.mark.parametrize("copied", [False, True])
def test_what_a_forward_pass_begins_with_is_gathered_beside_the_update(
    copied: bool, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = families.plan_with(alone.model("llama"), "fsdp", {"dp": 2}, model={"dtype": "bfloat16"})
    late = trained(plan, tmp_path / "late", PREPARED)
    monkeypatch.setattr(adamw, "LARGE", 512)
    monkeypatch.setattr(adamw, "_compiled_for", "cpu")
    early = counted(monkeypatch, FSDPModule, "unshard", tmp_path / "early")
    if copied:
        replace_symmetric_memory(monkeypatch, tmp_path)
    assert difference(trained(plan, tmp_path / "early run", PREPARED), late) < 1e-4
    units, ranks = 2, 2  # the embedding and the first layer
    assert len(early.read_text()) == units * ranks * plan.optim.max_steps


def test_a_unit_whose_part_is_large_on_some_ranks_only_is_gathered_by_none_of_them_early(
    alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = families.plan_with(alone.model("llama"), "fsdp", {"dp": 3}, model={"dtype": "bfloat16"})
    late = trained(plan, tmp_path / "late", PREPARED)
    monkeypatch.setattr(adamw, "LARGE", 22 * 64)  # of 64 rows a rank has 22, another 22, the last one 20
    monkeypatch.setattr(adamw, "_compiled_for", "cpu")
    early = counted(monkeypatch, FSDPModule, "unshard", tmp_path / "early")
    assert difference(trained(plan, tmp_path / "early run", PREPARED), late) < 1e-4
    units, ranks = 1, 3  # the embedding
    assert len(early.read_text()) == units * ranks * plan.optim.max_steps


def test_a_head_that_looks_at_its_weight_s_type_gets_what_it_computes_with(
    alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def casting(model: Any, input_ids: torch.Tensor, **named: Any) -> CausalLMOutput:
        """As some models do: outside of the head, its weight is the master."""
        hidden = model.model(input_ids=input_ids, **named).last_hidden_state
        return CausalLMOutput(logits=model.lm_head(hidden.to(model.lm_head.weight.dtype)))

    monkeypatch.setattr(LlamaForCausalLM, "forward", casting)
    plan = families.plan_with(alone.model("llama"), "fsdp", {"dp": 2}, model={"dtype": "bfloat16"})
    plain = families.plan_with(alone.model("llama"), "ddp", {"dp": 2}, model={"dtype": "bfloat16"})
    curves = [trained(one, tmp_path / one.train.strategy, PREPARED) for one in (plan, plain)]
    assert difference(*curves) < 5e-3


def test_zero_3_joins_its_partitions_on_the_device(
    alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = counted(monkeypatch, zero, "_flattened", tmp_path / "joined")
    trained(families.plan_for(alone.model("llama"), "ZeRO-3"), tmp_path / "run", PREPARED)
    assert joined.read_text() == "." * 4


def test_partitions_are_joined_as_deepspeed_joins_them() -> None:
    from deepspeed.runtime.zero.utils import defragment

    ours, theirs = ([torch.arange(n, dtype=torch.bfloat16) + n for n in (3, 5, 2)] for _ in range(2))
    assert torch.equal(zero._flattened(ours), defragment(theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.untyped_storage().data_ptr() == ours[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_masters_stepped_with_by_our_arithmetic_are_as_those_by_torch_s(
    alone: Alone, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = families.plan_with(alone.model("llama"), strategy, {"dp": 2}, model={"dtype": "bfloat16"})
    theirs = trained(plan, tmp_path / "theirs", PREPARED)
    monkeypatch.setattr(adamw, "LARGE", 512)
    monkeypatch.setattr(adamw, "_compiled_for", "cpu")
    updates = counted(monkeypatch, adamw, "_update", tmp_path / "updates")
    assert difference(trained(plan, tmp_path / "ours", PREPARED), theirs) < 1e-4
    assert updates.read_text()


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
