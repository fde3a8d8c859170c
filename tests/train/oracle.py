"""Two pairs on a tiny model: what TRL 1.16.0 makes of them. The numbers in ``ORACLE`` are its own.

python -m tests.train.oracle    computes them anew, where trl is installed (`make oracle`); it is not needed otherwise
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.train import small

VERSION = "1.16.0"
SIZES: dict[str, Any] = {
    "vocab_size": small.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPTS = ([5, 17, 33, 60, 9], [41, 8, 77])
CHOSEN = ([12, 90, 4, 2], [66, 23, 31, 50, 11, 84, 2])
REJECTED = ([70, 3, 3, 28, 19, 2], [14, 2])
MARGINS = (0.5, 0.0)  # what a reward model is to find between the answers of each pair, at least
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "apo_zero": {},
    "robust": {"label_smoothing": 0.2},
    "sigmoid+sft": {"rpo_alpha": 0.5},
}
# Of trl 1.16.0, transformers 5.23.0 and torch 2.13 on a CPU. beta 0.1, SimPO with gamma 0.5, KTO with a
# desirable_weight of 1.3; policy: seed 0, reference: seed 1.
ORACLE: dict[str, float] = {
    "sigmoid": 0.6995916,
    "hinge": 1.0125160,
    "ipo": 23.5141830,
    "sigmoid_norm": 0.6855572,
    "apo_zero": 1.0031022,
    "robust": 0.7037636,
    "sigmoid+sft": 3.0183218,
    "kto": 0.5753234,
    "orpo": 4.6592689,
    "cpo": 6.0040035,
    "cpo hinge": 6.3039308,
    "simpo": 0.9707661,
    "simpo+nll": 5.6082253,
    "rm": 1.1577641,
    "rm centred": 1.7215304,
}


def model(seed: int) -> LlamaForCausalLM:
    """Random weights, drawn wider than usual so that the answers differ much."""
    torch.manual_seed(seed)
    return _widened(LlamaForCausalLM(LlamaConfig(**SIZES)))


def reward_model(seed: int) -> LlamaForSequenceClassification:
    """The same with one score of a text for its head."""
    torch.manual_seed(seed)
    return _widened(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)))


@torch.no_grad()
def _widened(made: Any) -> Any:
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    return made.eval()


def windows() -> small.Windows:
    """Each pair as a window of two documents."""
    found = small.Windows()
    for prompt, good, bad, margin in zip(PROMPTS, CHOSEN, REJECTED, MARGINS, strict=True):
        window = _window(prompt, (good, bad), [1, 2])
        window.margins = [margin, margin]
        found.append(window)
    return found


def rated() -> small.Windows:
    """The first pair's answers as a good and a bad one, then the second's; one window."""
    parts = [
        _window(p, (answer,), [kind])
        for p, good, bad in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
        for answer, kind in ((good, 3), (bad, 4))
    ]
    tokens, trained = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "trained"))
    return small.Windows([small.Window(tokens, trained, [len(p.tokens) for p in parts], [p.kinds[0] for p in parts])])


def _window(prompt: list[int], answers: tuple[list[int], ...], kinds: list[int]) -> small.Window:
    texts = [prompt + answer for answer in answers]
    trained = [i >= len(prompt) for text in texts for i in range(len(text))]
    return small.Window(np.concatenate(texts).astype(np.int32), np.array(trained), [len(t) for t in texts], kinds)


def main() -> None:
    """Print the numbers, for ORACLE."""
    import trl

    assert trl.__version__ == VERSION, trl.__version__
    for name, value in {**_dpo(), "kto": _kto(), **_without_reference(), **_rewards()}.items():
        print(f'    "{name}": {value:.7f},')


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, small.VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )


OPTIONS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False, "max_length": None, "beta": 0.1,
    "per_device_train_batch_size": 4, "remove_unused_columns": False,
}  # fmt: skip


def _loss(trainer: Any, examples: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, trainer.data_collator(examples)))


def _dpo() -> dict[str, float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    text = Dataset.from_list([{"prompt": "t5", "chosen": "t6", "rejected": "t7"}] * 2)
    found = {}
    for name, settings in SETTINGS.items():
        kinds: Any = {"loss_type": name.split("+")}
        if "rpo_alpha" in settings:
            kinds["loss_weights"] = [1.0, settings["rpo_alpha"]]
        smoothing = {k: v for k, v in settings.items() if k == "label_smoothing"}
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model(0), model(1), DPOConfig(folder, **OPTIONS, **kinds, **smoothing),
                train_dataset=text, processing_class=_tokenizer(),
            )  # fmt: skip
            found[name] = _loss(trainer, rows)
    return found


def _kto() -> float:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt_ids": p, "completion_ids": answer, "label": label}
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
        for answer, label in ((c, True), (r, False))
    ]
    for i, row in enumerate(rows):
        row["KL_completion_ids"] = rows[i - 1]["completion_ids"]
    text = Dataset.from_list([{"prompt": "t5", "completion": "t6", "label": bool(i % 2)} for i in range(4)])
    with tempfile.TemporaryDirectory() as folder:
        config = KTOConfig(folder, **OPTIONS, train_sampling_strategy="sequential", desirable_weight=1.3)
        trainer = KTOTrainer(model(0), model(1), config, train_dataset=text, processing_class=_tokenizer())
        return _loss(trainer, rows)


def _without_reference() -> dict[str, float]:
    """ORPO and CPO: their own loss functions, on log-probabilities taken as their trainers take them."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = _padded([*zip(PROMPTS, CHOSEN, strict=True), *zip(PROMPTS, REJECTED, strict=True)])
    batch |= {"chosen_labels": batch["concatenated_labels"][:2]}
    settings: dict[str, Any] = {
        "beta": 0.1, "accelerator": SimpleNamespace(device="cpu"), "is_encoder_decoder": False,
        "aux_loss_enabled": False, "padding_value": 0, "pad_token_id": 0, "alpha": 0.0, "label_smoothing": 0.0,
        "cpo_alpha": 1.0, "simpo_gamma": 0.5,
        "concatenated_inputs": lambda *a, **k: batch, "loss_type": "sigmoid",
    }  # fmt: skip
    found = {}
    with torch.no_grad():
        orpo = SimpleNamespace(**settings, get_batch_logps=ORPOTrainer.get_batch_logps)
        chosen, rejected, _, _, nll, *_ = ORPOTrainer.concatenated_forward(orpo, model(0), batch)
        found["orpo"] = float(nll - ORPOTrainer.odds_ratio_loss(orpo, chosen, rejected)[0].mean())
        changed: dict[str, dict[str, Any]] = {
            "cpo": {}, "cpo hinge": {"loss_type": "hinge"}, "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
            "simpo+nll": {"loss_type": "simpo"},
        }  # fmt: skip
        for name, changes in changed.items():
            cpo = SimpleNamespace(**{**settings, **changes}, get_batch_logps=CPOTrainer.get_batch_logps)
            chosen, rejected, _, _, nll, *_ = CPOTrainer.concatenated_forward(cpo, model(0), batch)
            losses = CPOTrainer.cpo_loss(cpo, chosen, rejected)[0]
            found[name] = float(losses.mean() + cpo.cpo_alpha * nll)
    return found


def _rewards() -> dict[str, float]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": p + c, "rejected_ids": p + r, "margin": margin}
        for p, c, r, margin in zip(PROMPTS, CHOSEN, REJECTED, MARGINS, strict=True)
    ]
    text = Dataset.from_list([{"chosen": "t6", "rejected": "t7"}] * 2)
    options = {name: value for name, value in OPTIONS.items() if name != "beta"}
    found = {}
    for name, weight in (("rm", None), ("rm centred", 0.5)):
        with tempfile.TemporaryDirectory() as folder:
            config = RewardConfig(folder, **options, center_rewards_coefficient=weight)
            trainer = RewardTrainer(reward_model(0), config, train_dataset=text, processing_class=_tokenizer())
            found[name] = _loss(trainer, rows)
    return found


def _padded(texts: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(p) + len(a) for p, a in texts)
    rows = [(p + a, [-100] * len(p) + a, longest - len(p) - len(a)) for p, a in texts]
    return {
        "concatenated_input_ids": torch.tensor([tokens + [0] * pad for tokens, _, pad in rows]),
        "concatenated_labels": torch.tensor([labels + [-100] * pad for _, labels, pad in rows]),
        "concatenated_attention_mask": torch.tensor([[1] * len(t) + [0] * pad for t, _, pad in rows]),
    }


if __name__ == "__main__":
    main()
