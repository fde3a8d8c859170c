"""Keys that do nothing beside others are noted, by the word that was given; what is off or unsaid is not."""

from __future__ import annotations

import pytest

from tests.words import complaints, run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tuner_type full --lora_r 16 --lora_alpha 4", ["lora_r", "lora_alpha"]),
        ("--tuner_type full --target_modules q_proj", ["target_modules"]),
        ("--val_dataset b --val_size 0.1", ["val_size"]),
        ("--eval_steps 50", ["eval_steps"]),
        ("--eval_strategy epoch", ["eval_strategy"]),
        ("--max_steps 5 --num_train_epochs 7", ["num_train_epochs"]),
        ("--warmup_steps 5 --warmup_ratio 0.5", ["warmup_ratio"]),
        ("--lr_decay_ratio 0.2", ["lr_decay_ratio"]),
    ],
)
def test_a_key_without_effect_is_noted(line: str, words: list[str]) -> None:
    notes = run(line).notes
    assert [note.split(" has no effect here: ")[0] for note in notes] == words


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--tuner_type full --use_dora false --lora_dropout 0 --lora_bias none",
        "--lora_rank 16",
        "--val_dataset b --split_dataset_ratio 0 --eval_steps 50",
        "--split_dataset_ratio 0.1 --eval_strategy epoch",
        "--eval_strategy no",
        "--max_steps -1 --num_train_epochs 7",
        "--warmup_steps 0 --warmup_ratio 0.5",
        "--warmup_steps 5 --warmup_ratio 0 --max_steps 6",
        "--lr_scheduler wsd --lr_decay_ratio 0.2",
    ],
)
def test_a_key_with_effect_or_switched_off_is_not(line: str) -> None:
    assert run(line).notes == ()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--warmup_steps 100 --max_steps 4", "warmup_steps: 100 is no less than max_steps: 4"),
        ("--split_dataset_ratio 0.9", "split_dataset_ratio: 0.9 sets more rows aside than are trained on"),
    ],
)
def test_a_value_that_leaves_little_to_be_trained_is_noted(line: str, told: str) -> None:
    (note,) = run(line).notes
    assert note.startswith(told)


def test_all_rows_cannot_be_set_aside_for_evaluation() -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", "--split_dataset_ratio", "1")
    assert (problem.what, problem.value) == ("split_dataset_ratio: must be less than 1", "1")
