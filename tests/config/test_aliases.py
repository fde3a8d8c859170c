"""Words of other tools reach the leaf they mean, with the value they mean."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.aliases import ALIASES, NEEDS, SWITCHES, VALUES
from hpcft.config.declined import REFUSED, SET_ASIDE
from hpcft.config.leaves import leaf_sections, sections
from hpcft.config.load import load_run
from hpcft.config.run import RunConfig
from hpcft.errors import Refusal
from tests.words import complaints, run, write

LEAVES = leaf_sections()


def value(leaf: str, line: str) -> Any:
    """The value of ``leaf`` after the words of ``line``."""
    configured = run(line).run
    return getattr(getattr(configured, LEAVES[leaf]) if LEAVES[leaf] else configured, leaf)


def test_every_leaf_has_one_name_and_no_two_sections_share_one() -> None:
    names = [leaf for leaves in sections().values() for leaf in leaves]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("alias", "leaf"), ALIASES.items())
def test_an_alias_leads_to_a_leaf_that_exists(alias: str, leaf: str) -> None:
    assert leaf in LEAVES
    assert alias not in LEAVES


def test_a_word_stands_in_one_table_only() -> None:
    tables = [set(LEAVES), set(ALIASES), set(SWITCHES), set(SET_ASIDE), set(REFUSED)]
    everything = [word for table in tables for word in table]
    assert sorted(everything) == sorted(set(everything))


@pytest.mark.parametrize("leaf", VALUES)
def test_a_translated_value_is_one_that_its_leaf_takes(leaf: str) -> None:
    for said, ours in VALUES[leaf].items():
        if leaf != "task":  # what the objectives are is the plan's business
            found = value(leaf, f"--{leaf} {said}")
            assert found in (ours, (ours,)), said


@pytest.mark.parametrize(
    ("name", "said", "ours"), [(n, s, o) for n, table in SWITCHES.items() for s, o in table.items()]
)
def test_a_switch_says_what_its_table_says(name: str, said: Any, ours: tuple[str, Any] | None) -> None:
    line = f"--{name} {str(said).lower()}"
    if ours is None:
        assert run(line).run == run().run
    else:
        found = value(ours[0], line)
        assert found == (tuple(ours[1]) if isinstance(ours[1], list) else ours[1])


def test_a_switch_with_a_value_that_nobody_knows_names_the_ones_that_are() -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", "--optim", "adamw_8bit")
    assert problem.value == "adamw_8bit"
    assert "adamw_torch" in problem.choices


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--dataset_text_field body", "rename the column to text"),
        ("--use_chat_template false", "task: pretrain"),
        ("--tuner_backend unsloth", "peft's"),
        ("--dataset_shuffle false", "follows from seed"),
        ("--shuffle_merged_datasets false", "follows from seed"),
        ("--greater_is_better true", "lowest loss"),
        ("--s2_attention true", "attn_impl"),
    ],
)
def test_a_switch_that_would_change_the_training_says_what_to_use_instead(line: str, hint: str) -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", *line.split())
    assert hint in problem.hint


@pytest.mark.parametrize("word", ["--max_pixels 1003520", "--vit_lr 1e-5", "image_folder=x", "--is_multimodal"])
def test_words_for_images_are_recognised(word: str) -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", *word.split())
    assert problem.what.endswith("not in this release")
    assert "text models" in problem.hint


def test_a_type_of_task_that_is_not_trained_is_refused() -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", "--task_type", "embedding")
    assert (problem.value, "seq_cls" in problem.choices) == ("embedding", True)


def test_another_kind_of_problem_than_one_class_for_a_text_is_refused() -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", "--problem_type", "regression")
    assert (problem.value, problem.choices) == ("regression", ("single_label_classification",))
    assert "one of several classes" in problem.hint


# The table of names in use (transformers, ms-swift, LLaMA-Factory, axolotl, TRL, Megatron and torchtune), row by row.
@pytest.mark.parametrize(
    ("line", "leaf", "expected"),
    [
        ("--stage sft", "task", "sft"),
        ("--rlhf_type dpo", "task", "dpo"),
        ("--stage pt", "task", "pretrain"),
        ("--task_type seq_cls", "task", "seq_cls"),
        ("--task_type causal_lm --rlhf_type dpo", "task", "dpo"),
        ("--task_type SEQ_CLS --num_labels 3 --problem_type single_label_classification", "num_labels", 3),
        ("--train_type full", "tuner_type", "full"),
        ("--sft_type full", "tuner_type", "full"),
        ("--finetuning_type full", "tuner_type", "full"),
        ("--adapter lora", "tuner_type", "lora"),
        ("--use_peft false", "tuner_type", "full"),
        ("--lora_r 64", "lora_rank", 64),
        ("--lora_target all", "target_modules", ("all-linear",)),
        ("--lora_target q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ("--lora_target_modules q_proj k_proj", "target_modules", ("q_proj", "k_proj")),
        ("--lora_target_linear", "target_modules", ("all-linear",)),
        ("--additional_target embed_tokens,lm_head", "modules_to_save", ("embed_tokens", "lm_head")),
        ("--lora_modules_to_save lm_head", "modules_to_save", ("lm_head",)),
        ("--bf16", "torch_dtype", "bfloat16"),
        ("--bf16 auto", "torch_dtype", "bfloat16"),
        ("--fp16 true", "torch_dtype", "float16"),
        ("--bf16 true --fp16 false", "torch_dtype", "bfloat16"),
        ("--dtype fp32", "torch_dtype", "float32"),
        ("--eval_dataset b.jsonl", "val_dataset", ("b.jsonl",)),
        ("--val_size 0.1", "split_dataset_ratio", 0.1),
        ("--val_set_size 0.1", "split_dataset_ratio", 0.1),
        ("--test_datasets b c", "val_dataset", ("b", "c")),
        ("--cutoff_len 512", "max_length", 512),
        ("--sequence_len 512", "max_length", 512),
        ("--seq_length 512", "max_length", 512),
        ("--max_seq_length 512", "max_length", 512),
        ("--excess_length_strategy truncate", "truncation_strategy", "truncate_right"),
        ("--truncation_strategy left", "truncation_strategy", "truncate_left"),
        ("--truncation_strategy delete", "truncation_strategy", "drop"),
        ("--sample_packing false", "packing", False),
        ("--neat_packing", "packing", True),
        ("--chat_template tokenizer_default", "chat_template", None),
        ("--template my/template.jinja", "chat_template", "my/template.jinja"),
        ("--chat_template_path t.jinja", "chat_template", "t.jinja"),
        ("--default_system 'Be kind.'", "system", "Be kind."),
        ("--default_system_message 'Be kind.'", "system", "Be kind."),
        ("--micro_batch_size 2", "per_device_train_batch_size", 2),
        ("--local_batch_size 2", "per_device_train_batch_size", 2),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size", "auto"),
        ("--num_epochs 2", "num_train_epochs", 2.0),
        ("--lr 1e-3", "learning_rate", 1e-3),
        ("--lr_scheduler linear", "lr_scheduler_type", "linear"),
        ("--lr_decay_style cosine", "lr_scheduler_type", "cosine"),
        ("--warmup_steps 0.1", "warmup_ratio", 0.1),
        ("--warmup_steps 10", "warmup_steps", 10),
        ("--gradient_clipping 0.5", "max_grad_norm", 0.5),
        ("--gradient_checkpointing true", "gradient_checkpointing", "full"),
        ("--gradient_checkpointing false", "gradient_checkpointing", "none"),
        ("--disable_gradient_checkpointing", "gradient_checkpointing", "none"),
        ("--activation_checkpointing selective", "gradient_checkpointing", "selective"),
        ("--ckpt_every_steps 7", "save_steps", 7),
        ("--auto_resume_from_checkpoints", "resume_from_checkpoint", "auto"),
        ("--restore_from old/checkpoints/step-000010", "resume_from_checkpoint", "old/checkpoints/step-000010"),
        ("--tensor_model_parallel_size 2", "tp", 2),
        ("--tensor_parallel_degree 2", "tp", 2),
        ("--dp_replicate_size 2", "dp_replicate", 2),
        ("--flash_attn fa2", "attn_impl", "flash_attention_2"),
        ("--attn_implementation sdpa", "attn_impl", "sdpa"),
        ("--train_on_inputs", "train_on", "all"),
        ("--loss_scale last_round", "train_on", "last_turn"),
        ("--assistant_only_loss true", "train_on", "assistant"),
        ("--assistant_only_loss false", "train_on", "all"),
        ("--completion_only_loss true", "train_on", "assistant"),
        ("--eval_strategy no", "eval_steps", -1),
        ("--eval_strategy epoch", "eval_steps", 0),
        ("--nnodes 2", "nodes", 2),
        ("--ntasks_per_node 4", "nproc_per_node", 4),
        ("--full_determinism", "deterministic", True),
    ],
)
def test_a_word_of_another_tool_is_understood(line: str, leaf: str, expected: Any) -> None:
    assert value(leaf, line) == expected


@pytest.mark.parametrize("name", ["model_name_or_path", "base_model", "pretrained_model_name_or_path"])
def test_the_model_goes_by_its_other_names(name: str) -> None:
    assert load_run([f"--{name}", "Qwen/Qwen2.5-7B", "--dataset", "a"]).run.model.model == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize("name", SET_ASIDE)
def test_a_word_without_effect_is_accepted_and_said_to_have_none(name: str) -> None:
    loaded = run(f"--{name} 1")
    assert loaded.notes == (f"{name} has no effect here: {SET_ASIDE[name]}",)
    assert loaded.run == run().run


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_release_does_not_do_is_refused_with_the_alternative(name: str) -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", f"--{name}", "4")
    assert name in problem.what
    assert problem.value == "4"
    assert problem.hint == REFUSED[name]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--adapter qlora --load_in_4bit false", "load_in_4bit: contradicts adapter: qlora"),
        ("--quant_bits 4 --load_in_4bit false", "load_in_4bit: contradicts quant_bits: 4"),
        ("--bf16 true --fp16 true", "fp16: contradicts bf16: true"),
        ("--train_type lora --finetuning_type full", "finetuning_type: contradicts train_type: lora"),
        ("--cutoff_len 2048 --max_length 1024", "max_length: contradicts cutoff_len: 2048"),
        ("--sdp_attention true --flash_attention true", "flash_attention: contradicts sdp_attention: true"),
        ("--attn_impl flash_attention_2 --flash_attention false", "flash_attention: contradicts attn_impl: flash_"),
        ("--lora_target_modules q_proj --lora_target_linear true", 'contradicts lora_target_modules: ["q_proj"]'),
        ("--mask_history true --train_on_prompt true", "train_on_prompt: contradicts mask_history: true"),
        ("--train_on all --train_on_inputs false", "train_on_inputs: contradicts train_on: all"),
        ("--packing true --neat_packing false", "neat_packing: contradicts packing: true"),
    ],
)
def test_words_that_contradict_each_other_are_refused_with_both_values(line: str, what: str) -> None:
    (problem,) = complaints("--model", "m", "--dataset", "a", *line.split())
    assert what in problem.what
    assert problem.what.endswith(" at command line")
    assert problem.value == ("true" if line.endswith("true") else line.split()[-1])


@pytest.mark.parametrize(
    ("line", "leaf", "expected", "notes"),
    [
        ("--packing true --neat_packing true", "packing", True, 1),
        ("--packing true --sample_packing", "packing", True, 1),
        ("--lr 1e-4 --learning_rate 0.0001", "learning_rate", 1e-4, 1),
        ("--adapter qlora --load_in_4bit true", "quant_bits", 4, 0),
        ("--mask_history true --train_on_inputs false", "train_on", "last_turn", 0),
    ],
)
def test_words_that_agree_are_accepted(line: str, leaf: str, expected: Any, notes: int) -> None:
    assert value(leaf, line) == expected
    assert [note for note in run(line).notes if "says the same as" in note] == list(run(line).notes)
    assert len(run(line).notes) == notes


def test_a_switch_that_is_off_takes_back_what_the_file_said(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\ndataset: a\nadapter: qlora\ntrain_on: all\n")
    configured = load_run([file, "--load_in_4bit", "false", "--train_on_inputs", "false"]).run
    assert (configured.model.quant_bits, configured.data.train_on) == (None, "assistant")


def test_a_key_with_nothing_behind_it_does_not_contradict_another_name(tmp_path: Path) -> None:
    for text in ("lora_target_modules:\nlora_target: q_proj\n", "lora_target: q_proj\nlora_target_modules:\n"):
        loaded = load_run([write(tmp_path, "model: m\ndataset: a\n" + text)])
        assert (loaded.run.tuner.target_modules, loaded.notes) == (("q_proj",), ())


@pytest.mark.parametrize("name", NEEDS)
def test_how_to_quantise_without_quantising_is_noted(name: str) -> None:
    said = next(iter(SWITCHES[name]))
    line = f"--{name} {str(said).lower()}"
    assert run(line).notes == (f"{name} has no effect here: quant_bits is not given",)
    assert run(f"{line} --quant_bits 4").notes == ()


@pytest.mark.parametrize("off", ["null", "none", "false", "no", "0", ""])
@pytest.mark.parametrize("name", ["deepspeed", "load_in_8bit", "quant_bits", "streaming"])
def test_what_is_switched_off_is_not_refused(name: str, off: str) -> None:
    assert run(f"--{name}={off}").run == run().run


@pytest.mark.parametrize("name", ["pp", "cp_size", "expert_model_parallel_size", "dp_shard"])
def test_one_of_an_axis_is_no_axis(name: str) -> None:
    assert run(f"--{name} 1").run == run().run
    assert complaints("--model", "m", "--dataset", "a", f"--{name}", "2")


def test_lists_are_the_leaves_that_take_several_values() -> None:
    from hpcft.config.leaves import list_names

    tuples = {
        leaf
        for section, leaves in sections().items()
        for leaf in leaves
        if typing.get_origin(
            (typing.cast(Any, RunConfig.model_fields[section].annotation) if section else RunConfig)
            .model_fields[leaf]
            .annotation
        )
        is tuple
    }
    assert tuples <= list_names()
    assert {"datasets", "lora_target"} <= list_names()


def test_a_refusal_of_a_dataset_map_points_at_its_key() -> None:
    with pytest.raises(Refusal, match="a dataset has no pathh here") as caught:
        run("""--val_dataset '[{"path": "a", "pathh": "b"}]'""")
    assert caught.value.problems[0].where == "command line"
    assert "did you mean path?" in caught.value.problems[0].hint
