"""Scores of a text in the place of its next token's probabilities: what makes a reward model, or a classifier, of one.

It is transformers' model for sequence classification, with one label or several, whose head is a linear without bias on
the last hidden state. The scores of a document are those of its last token, found by its number: transformers looks for
the last token that is no padding, which a text that ends in the padding token would not survive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpcft.errors import refuse
from hpcft.plan.plan import Plan
from hpcft.train.attention import document_arguments
from hpcft.train.protocols import Batch
from hpcft.train.scores import per_document
from hpcft.train.skeleton import body_of, plain, run_inside

HEAD = "score"  # transformers' name of it in every decoder, and one of those that peft trains in full


def auto_class(plan: Plan) -> Any:
    """The class of transformers that makes the run's model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if plan.scored else AutoModelForCausalLM


def said_of_scores(plan: Plan) -> dict[str, Any]:
    """What the base's configuration must say. Without a padding token a text by itself is scored at its very end."""
    if not plan.scored:
        return {}
    if not plan.labelled:
        return {"num_labels": 1, "pad_token_id": None}
    names = plan.objective.labels
    return {
        "id2label": dict(enumerate(names)),  # num_labels follows from it
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
        "pad_token_id": None,
    }


def scores_of(plan: Plan) -> int:
    """How many scores a text has."""
    return len(plan.objective.labels) if plan.labelled else 1


def check_decoder(config: Any, plan: Plan) -> None:
    """Raises Refusal for a base of which transformers makes no model that says the next token."""
    from transformers import AutoModelForCausalLM

    if type(config) in AutoModelForCausalLM._model_mapping:
        return
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise refuse(
            f"model: transformers has no decoder of text for a model of type {config.model_type}",
            value=plan.model.path,
            hint="a base whose config.json says …ForCausalLM, such as Qwen/Qwen2.5-7B-Instruct",
        )


def check_family(config: Any, plan: Plan) -> None:
    """Raises Refusal for a base that has no score, or other ones already."""
    from transformers import AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if kind is None and not getattr(config, "auto_map", None):
        raise refuse(
            f"task: transformers has no score for a model of type {config.model_type}",
            value=plan.train.objective,
            hint="a base of Llama's, Qwen's, Mistral's, Gemma's or Phi's family",
        )
    classes = getattr(config, "architectures", None) or [""]
    if "SequenceClassification" not in classes[0]:
        return
    there, names = config.num_labels, tuple(config.id2label[n] for n in sorted(config.id2label))
    if plan.labelled and there != scores_of(plan):
        what = f"task: the base has {there} classes already, the data {scores_of(plan)}"
        raise refuse(what, value=plan.model.path, choices=names[:20], hint="label the data as the base does")
    if plan.labelled and not names[0].startswith("LABEL_") and names != plan.objective.labels:
        what = f"task: the base's classes are others than the data's, {', '.join(plan.objective.labels[:20])}"
        raise refuse(what, value=plan.model.path, choices=names[:20], hint="label the data as the base does")
    if not plan.labelled and there != 1:
        raise refuse(f"task: the base has {there} scores already, a reward is one", value=plan.model.path)


def check_head(model: Any) -> None:
    """Raises Refusal for a family whose score is computed in another way."""
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise refuse(f"task: {type(model).__name__} has no linear {HEAD}, by which this release scores texts")


def head_of_score(model: Any) -> Any:
    """The layer that gives a model's scores, a peft model's too; None for a language model."""
    return getattr(plain(model), HEAD, None)


def fresh(config: Any, seed: int) -> torch.Tensor:
    """float32 [scores, width]: the weight of a head that the base does not have, the same for the same seed."""
    text = config.get_text_config()
    shape, numbers = (config.num_labels, text.hidden_size), torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=numbers) * float(getattr(text, "initializer_range", None) or 0.02)


def text_scores(model: nn.Module, batch: Batch) -> torch.Tensor:
    """float32 [documents, scores]: each one's scores at its last token; of none, still attached to the model."""
    arguments = {"input_ids": batch.tokens, "position_ids": batch.positions, **document_arguments(batch)}

    def last_tokens() -> torch.Tensor:
        hidden = body_of(model)(**arguments, use_cache=False).last_hidden_state
        scores: torch.Tensor = head_of_score(model)(hidden.flatten(0, 1)[ends(batch)])
        return scores.float()

    found: torch.Tensor = run_inside(model, last_tokens)
    return found


def ends(batch: Batch) -> torch.Tensor:
    """int64 [documents]: the flat index of each one's last token, without waiting for the device."""
    of = batch.documents.flatten()
    last = (of >= 0) & (of != of.roll(-1))
    if len(batch.kinds) == 1:  # without padding the last position is followed by the first, of the same document
        last[-1:] |= of[-1:] >= 0
    at = torch.arange(of.numel(), device=of.device)
    return per_document(batch, torch.where(last, of, len(batch.kinds)), at)
