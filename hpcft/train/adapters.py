"""LoRA on a model that is still empty, as peft makes it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from hpcft.errors import Refusal, refuse
from hpcft.plan.modules import unmatched
from hpcft.plan.plan import TunerPlan
from hpcft.train.libraries import absent
from hpcft.train.score import head_of_score
from hpcft.train.skeleton import parts_beyond_text

FROM_WEIGHTS = ("pissa", "olora")  # adapters that are taken out of the weights they sit on


def add_adapters(model: nn.Module, tuner: TunerPlan, seed: int) -> nn.Module:
    """Freeze the model and add LoRA as peft makes it; adapters are float32 and the same for the same seed."""
    with absent("bitsandbytes"):
        from peft import LoraConfig, get_peft_model

    targets = "all-linear" if tuner.target_modules == ("all-linear",) else list(tuner.target_modules)
    unmet = parts_beyond_text(model) if targets == "all-linear" else []  # adapters there would be trained by nothing
    initial = {"true": True, "false": False}.get(tuner.init_lora_weights, tuner.init_lora_weights)
    config = LoraConfig(
        task_type="CAUSAL_LM" if head_of_score(model) is None else "SEQ_CLS",
        r=tuner.rank,
        lora_alpha=tuner.alpha,
        lora_dropout=tuner.dropout,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?({'|'.join(unmet)})\..*" if unmet else None,
        modules_to_save=list(tuner.modules_to_save) or None,
        bias=tuner.bias,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        init_lora_weights=initial,
    )
    if _touches_tied_weights(model, tuner):
        config.ensure_weight_tying = True
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(), absent("bitsandbytes"):
            warnings.simplefilter("ignore", FutureWarning)  # peft's use of names that transformers renames
            return get_peft_model(model, config)
    except ValueError as error:
        raise refuse(
            f"tuner: peft refuses these settings: {error}", hint="see target_modules and the other keys of tuner"
        ) from error


def _touches_tied_weights(model: nn.Module, tuner: TunerPlan) -> bool:
    """Are embedding and head one weight, and is either adapted? Then both must be, or they come apart."""
    named = {*tuner.target_modules, *tuner.modules_to_save}
    tied = bool(model.config.tie_word_embeddings) and head_of_score(model) is None
    return tied and bool(named & {"lm_head", "embed_tokens"})


def refuse_unmatched(model: nn.Module, tuner: TunerPlan) -> None:
    """Raises Refusal for names of ``target_modules`` and ``modules_to_save`` that no module has."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if problems := [problem for some in unmatched(tuner, names).values() for problem in some]:
        raise Refusal(problems)


def is_adapter(name: str) -> bool:
    return "lora_" in name
