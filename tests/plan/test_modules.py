"""Names of modules that no module of the model has are refused, where its family is known before it is built."""

from __future__ import annotations

from typing import Any

import pytest

from hpcft.plan.modules import modules_of, unmatched
from tests.plans import plan

QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2}


def wrong(names: tuple[str, ...], **tuner: Any) -> dict[str, list[str]]:
    chosen = plan(tuner={"kind": "lora", **tuner}).tuner
    return {leaf: [problem.value for problem in some] for leaf, some in unmatched(chosen, names).items()}


def test_each_name_that_matches_nothing_is_refused_beside_those_that_match() -> None:
    names = modules_of(QWEN2, False)
    found = wrong(names, target_modules=("q_proj", "bar"), modules_to_save=("lm_head", "foo"))
    assert found == {"target_modules": ["bar"], "modules_to_save": ["foo"]}


@pytest.mark.parametrize(
    "targets", ["all-linear", "q_proj", "mlp.up_proj", "model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]
)
def test_endings_and_whole_paths_match(targets: str) -> None:
    assert wrong(modules_of(QWEN2, False), target_modules=(targets,)) == {}


@pytest.mark.parametrize("targets", ["proj", "model.layers.2.self_attn.q_proj", "Q_PROJ", "query_key_value"])
def test_a_part_of_a_name_and_a_layer_too_many_match_nothing(targets: str) -> None:
    assert wrong(modules_of(QWEN2, False), target_modules=(targets,)) == {"target_modules": [targets]}


def test_all_linear_beside_others_is_no_module() -> None:
    chosen = plan(tuner={"kind": "lora", "target_modules": ("all-linear", "lm_head")}).tuner
    [problem] = unmatched(chosen, modules_of(QWEN2, False))["target_modules"]
    assert "stands alone" in problem.hint


def test_the_names_that_exist_and_the_nearest_are_told() -> None:
    chosen = plan(tuner={"kind": "lora", "target_modules": ("qproj",)}).tuner
    [problem] = unmatched(chosen, modules_of(QWEN2, False))["target_modules"]
    assert (problem.hint, problem.choices[:3]) == ("did you mean q_proj?", ("embed_tokens", "q_proj", "k_proj"))


def test_a_run_without_adapters_and_an_unknown_family_are_not_judged() -> None:
    assert unmatched(plan(tuner={"target_modules": ("bar",)}).tuner, modules_of(QWEN2, False)) == {}
    for config in ({"model_type": "new", "num_hidden_layers": 2}, {**QWEN2, "auto_map": {"a": "b"}}, {}):
        assert modules_of(config, False) == ()
