"""What a Plan allows and had better be otherwise: a note for each."""

from __future__ import annotations

from collections.abc import Iterator

from hpcft.plan.plan import Plan
from hpcft.plan.shape import Shape

KTO_ANSWERS = 8  # in a global batch; of fewer the mean says little


def notes(plan: Plan, shape: Shape | None) -> Iterator[str]:
    """shape: of the model, where it is known."""
    yield from _few_answers(plan)
    if shape is not None and 0 < shape.positions < plan.data.max_length:
        yield (
            f"max_length: {plan.data.max_length:,} is more than the {shape.positions:,} tokens that the model was made "
            "for (max_position_embeddings)"
        )


def _few_answers(plan: Plan) -> Iterator[str]:
    windows = plan.batch.global_windows
    if plan.train.objective == "kto" and windows < KTO_ANSWERS:
        what = f"{windows} windows, which may hold few answers" if plan.data.packing else f"{windows} answers"
        yield (
            f"kto: its KL term is a mean over the global batch, a poor estimate from {what}; "
            f"global_batch_size: {KTO_ANSWERS} or more"
        )
