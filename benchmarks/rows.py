"""The windows of a measurement as other trainers read them: lists of tokens and labels, in the order in which our loop
takes the windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.made import prompt_length
from benchmarks.task import Task

IGNORED = -100


def documents(task: Task) -> list[dict[str, Any]]:
    """Every document as a row, in the order in which our loop takes them."""
    rows = []
    for window in in_order(task):
        at = 0
        for n in window.documents:
            tokens = window.tokens[at : at + n]
            rows.append({"input_ids": tokens.tolist(), "labels": labels(tokens, window.trained[at : at + n])})
            at += n
    return rows


def windows(task: Task) -> list[dict[str, Any]]:
    """Every window as a row, with where its documents end."""
    return [
        {
            "input_ids": window.tokens.tolist(),
            "labels": labels(window.tokens, window.trained),
            "seq_lengths": list(window.documents),
        }
        for window in in_order(task)
    ]


def pairs(task: Task) -> list[dict[str, Any]]:
    """Every pair as a row."""
    rows = []
    for window in in_order(task):
        at = 0
        for index in range(0, len(window.documents), 2):
            chosen, rejected = window.documents[index : index + 2]
            prompt = prompt_length(window.documents, index)
            first, second = window.tokens[at : at + chosen], window.tokens[at + chosen : at + chosen + rejected]
            rows.append({
                "prompt_ids": first[:prompt].tolist(), "chosen_ids": first[prompt:].tolist(),
                "rejected_ids": second[prompt:].tolist(),
            })  # fmt: skip
            at += chosen + rejected
    return rows


def in_order(task: Task) -> list[Any]:
    made = task.windows()
    return [made[index] for step in task.order(task.plan()) for index in step]


def labels(tokens: Any, trained: Any) -> list[int]:
    """Their labels: the token itself where it is trained."""
    import numpy as np

    return list(np.where(trained, tokens, IGNORED).tolist())


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch as transformers' own collators make it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    marks = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(marks, batch_first=True, padding_value=IGNORED),
    }
