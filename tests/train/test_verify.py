"""What is compared on which ranks, in what model, and that a strategy which differs or fails is a row that says so."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpcft.plan.plan import Plan
from hpcft.run.paths import RunPaths
from hpcft.train import equivalence, miniature, verify, world
from tests import plans
from tests.train import families, small


def test_no_case_of_a_run_that_is_compiled_is_compiled(tmp_path: Path) -> None:
    plan, layout = plans.plan(train={"compiled": True}), plans.layout(1, 2)
    for case in equivalence.cases(layout, heads=4):
        made = equivalence.case_plan(plan, case, tmp_path, "lora", case.layout(1, 2), 4)
        assert not made.train.compiled, case.name


@pytest.mark.parametrize(
    ("nodes", "on_node", "names"),
    [
        (1, 2, "DDP ZeRO-1 ZeRO-2 ZeRO-3 FSDP2 TP"),
        (2, 1, "DDP ZeRO-1 ZeRO-2 ZeRO-3 FSDP2"),
        (1, 3, "DDP ZeRO-1 ZeRO-2 ZeRO-3 FSDP2"),
        (1, 4, "DDP ZeRO-1 ZeRO-2 ZeRO-3 FSDP2 HSDP TP FSDP2×TP DDP×TP"),
        (2, 8, "DDP ZeRO-1 ZeRO-2 ZeRO-3 FSDP2 HSDP FSDP2×TP DDP×TP"),
    ],
)
def test_what_the_ranks_can_be_arranged_to(nodes: int, on_node: int, names: str) -> None:
    layout = plans.layout(nodes, on_node)
    cases = equivalence.cases(layout, heads=4)
    assert " ".join(case.name for case in cases) == names
    assert {math.prod(case.degrees.values()) for case in cases} == {layout.world_size}
    for case in cases:
        assert equivalence.windows_of_a_step(layout) % case.layout(nodes, on_node).data_parallel == 0


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_a_miniature_of_its_own(family: str, tmp_path: Path) -> None:
    import transformers

    name, particular = families.FAMILIES[family]
    large = getattr(transformers, name)(**particular)
    large.save_pretrained(tmp_path / "large")
    load = lambda: transformers.AutoConfig.from_pretrained(tmp_path / "large")  # noqa: E731
    assert miniature.of_family(load, tmp_path / "small") == (large.model_type, "")
    small_one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(parameter.numel() for parameter in small_one.parameters()) < 300_000
    assert bool(small_one.config.tie_word_embeddings) == bool(large.tie_word_embeddings)


def test_a_configuration_that_cannot_be_had_is_replaced_and_the_table_says_so(tmp_path: Path) -> None:
    def load() -> Any:
        raise OSError("not in the cache\nmore words")

    assert miniature.of_family(load, tmp_path / "model") == ("qwen2", "OSError: not in the cache")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def a_plan(folder: Path, ranks: int = 2) -> Plan:
    return small.tiny(folder, ranks, train={"strategy": "fsdp", "strategy_module": "hpcft.train.strategies.fsdp"})


def found(plan: Plan, root: Path, spoil: Any = None) -> list[list[Any]]:
    """On each rank: the rows of the table, after ``spoil``."""
    if spoil is not None:
        spoil()
    plan = verify.patient(plan)
    here = world.join(plan)
    table = verify.verify(plan, RunPaths(root), here)
    here.barrier()
    return [[row.strategy, row.verdict, row.note] for row in table.rows]


def test_a_strategy_that_differs_and_one_that_fails_on_one_rank_are_rows_and_the_others_go_on(
    tmp_path: Path, model: Path
) -> None:
    def spoil() -> None:
        from hpcft.train.strategies import ddp, zero

        honest = ddp.DataParallel.backward

        def doubled(self: Any, loss: torch.Tensor, last: bool) -> None:
            honest(self, loss * (2 if self.world.size > 1 and not self.skeleton.regions else 1), last)

        def broken(skeleton: Any, plan: Plan, world: Any) -> Any:
            raise RuntimeError("no such luck")

        ddp.DataParallel.backward = doubled  # type: ignore[method-assign]  # in this forked rank alone
        zero.build = broken

    rows, _ = small.on_ranks(2, found, a_plan(model), tmp_path, spoil)
    verdicts = {name: verdict for name, verdict, _ in rows}
    assert verdicts["DDP"] == "differs"
    assert {verdicts[f"ZeRO-{stage}"] for stage in (1, 2, 3)} == {"failed"}
    assert (verdicts["FSDP2"], verdicts["TP"]) == ("ok", "ok")
    assert next(note for name, _, note in rows if name == "ZeRO-1") == "rank 0: RuntimeError: no such luck"


def test_a_rank_that_fails_alone_leaves_the_table_as_far_as_it_went(tmp_path: Path, model: Path) -> None:
    def spoil() -> None:
        from hpcft.train.strategies import fsdp

        honest = fsdp.build

        def broken(skeleton: Any, plan: Plan, world: Any) -> Any:
            for group in (dist.group.WORLD, world.control):  # from here on: before, a slow peer is no lost one
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
            if world.rank == 1:
                raise RuntimeError("no such luck")
            return honest(skeleton, plan, world)

        fsdp.build = broken

    with suppress(AssertionError):  # what the ranks come to afterwards depends on where they wait for each other
        small.on_ranks(2, found, a_plan(model), tmp_path, spoil)
    rows = json.loads((tmp_path / "verify.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["ok", "ok", "ok", "ok", "failed", rows[5]["verdict"]]
    assert re.search("no such luck|lost each other", rows[4]["note"])


def test_the_runs_own_layout_is_compared_where_no_other_case_is_it(tmp_path: Path) -> None:
    model = families.save(tmp_path, "llama")
    own = plans.layout(2, 4, dp_replicate=4, dp=2, tp=1)
    plan = plans.plan(layout=own, train={"strategy": "fsdp"})
    [*_, last] = verify.own_cases(plan, model)
    assert (last.name, last.axes) == ("this run's fsdp", "dp_replicate 4 × dp 2")
    plain = verify.own_cases(plans.plan(layout=plans.layout(2, 4)), model)
    assert plain == equivalence.cases(plans.layout(2, 4), 4)


def test_curves_of_other_lengths_are_never_taken_for_equal() -> None:
    assert equivalence.difference([[2.0, 1.0]], [[2.0, 1.25]]) == pytest.approx(0.2)
    for one, other in (([], []), ([[1.0, 1.0]], []), ([[1.0, 1.0]], [[1.0, 1.0]] * 2)):
        with pytest.raises(ValueError, match="steps"):
            equivalence.difference(one, other)
