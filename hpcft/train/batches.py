"""Windows become batches: padded, shifted, with restarting positions, a few steps ahead of the device.

Worker threads only make batches early; which batch comes when is fixed by ``order``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from hpcft.plan.plan import Plan
from hpcft.train.order import Order, Share, shares
from hpcft.train.protocols import Batch, Window, Windows
from hpcft.train.windows import Plain, apart, mismatched, plain

IGNORED = -100  # what torch's cross entropy leaves out
PAD = 0  # any valid token: nothing trained ever attends to it
AHEAD = 2  # batches made ahead per worker


@dataclass(frozen=True)
class Micro:
    """One micro batch and its place: ``share.position`` within the step's windows seeds its dropout.

    tokens: of its windows, padding not counted.
    """

    share: Share
    batch: Batch
    tokens: int


def collate(
    windows: Sequence[Window], packed: bool, ids: tuple[int, ...] = (), multiple: int = 1, few_shapes: bool = False
) -> Batch:
    """One row per window, padded to the longest and to a multiple of ``multiple`` tokens, on the CPU.

    packed: positions restart with every document, and the padding is a document of its own. Unpacked, each document
    has a row, which counts on through its padding: attention is causal, so nothing before it sees it, and the kernel
    needs no mask.
    """
    whole = [plain(window) for window in windows]
    rows = whole if packed else [row for window in whole for row in apart(window)]
    length = -(-max(len(row.tokens) for row in rows) // multiple) * multiple
    tokens = np.full((len(rows), length), PAD, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
    documents = np.full((len(rows), length), -1, dtype=np.int64)
    lengths, kinds, margins = [], list[int](), list[float]()
    for row, window in enumerate(rows):
        n = len(window.tokens)
        tokens[row, :n] = window.tokens
        labels[row, : n - 1] = _next_tokens(window)
        documents[row, :n] = np.repeat(len(kinds) + np.arange(len(window.documents)), window.documents)
        kinds += window.kinds
        margins += window.margins
        lengths.append([*window.documents, *([length - n] if n < length else [])])
        if packed:
            positions[row] = np.concatenate([np.arange(d) for d in lengths[row]])
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        lengths=lengths,
        packed=packed,
        trained=torch.from_numpy(np.flatnonzero(labels != IGNORED)),
        windows=ids,
        documents=torch.from_numpy(documents),
        kinds=tuple(kinds),
        margins=tuple(margins),
        reference=_joined([window.reference for window in rows]),
        few_shapes=few_shapes,
    )


def _joined(parts: Sequence[Sequence[float] | None]) -> tuple[float, ...] | None:
    """One row of numbers, where each window has its own."""
    return None if None in parts else tuple(number for part in parts for number in part or ())


def _next_tokens(window: Plain) -> np.ndarray:
    """int64 [n - 1]: the token after each one where it is trained and of the same document."""
    starts = np.cumsum(np.asarray(window.documents, dtype=np.int64))[:-1]
    trained = np.array(window.trained, dtype=bool)
    trained[starts] = False
    following = np.asarray(window.tokens, dtype=np.int64)[1:]
    return np.where(trained[1:], following, IGNORED)


def untrained(batch: Batch) -> Batch:
    """The same batch with nothing to train: it takes part in a forward pass and counts nothing."""
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORED),
        trained=batch.trained[:0],
        windows=(),
        documents=torch.full_like(batch.documents, -1),
        kinds=(),
        margins=(),
        reference=None if batch.reference is None else (),
        others=None if batch.others is None else untrained(batch.others),
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``, copied without waiting where that is possible."""
    if device.type == "cpu":
        return batch
    moved = {
        name: getattr(batch, name).pin_memory().to(device, non_blocking=True)
        for name in ("tokens", "positions", "labels", "trained", "documents")
    }
    return replace(batch, **moved, others=batch.others and on_device(batch.others, device))


@dataclass(frozen=True)
class Step:
    """One optimizer step as this rank sees it. windows: of all ranks. micros: its own ``count`` micro batches.

    count is the same on every rank: some strategies exchange weights in each forward pass, so a rank without windows
    of its own takes part with a micro batch that trains nothing.
    """

    windows: tuple[int, ...]
    count: int
    micros: Iterator[Micro]


def steps(windows: Windows, order: Order, consumed: int, plan: Plan, rank: int, ranks: int) -> Iterator[Step]:
    """The optimizer steps after ``consumed`` windows, without end, for reader ``rank`` of ``ranks``.

    A step's micro batches must be used up before the next step is asked for.
    """
    per_forward = plan.batch.micro_windows

    def mine(step: tuple[int, ...]) -> list[Share | None]:
        own: list[Share | None] = list(shares(step, per_forward, rank, ranks))
        most = len(list(shares(step, per_forward, 0, ranks)))
        return own + [None] * (most - len(own))

    makers = (
        partial(_micro, windows, share, plan) if share else partial(_idle, windows, step, plan)
        for step in order.steps(consumed)
        for share in mine(step)
    )
    made = ahead(makers, plan.train.dataloader_workers)
    for step in order.steps(consumed):
        count = len(mine(step))
        yield Step(step, count, islice(made, count))


def batch_of(windows: Windows, ids: tuple[int, ...], plan: Plan) -> Batch:
    """The windows ``ids`` as the plan wants them; rated answers with each prompt's other answer beside it."""
    packed, few_shapes = plan.data.packing, plan.train.compiled
    ranks = plan.layout.degree("tp")  # which share each row
    multiple = -(-plan.data.max_length // ranks) * ranks if few_shapes else ranks
    batch = collate([windows[i] for i in ids], packed, ids, multiple, few_shapes)
    if plan.data.rows != "rated":
        return batch
    others = [mismatched(windows, i, plan.data.max_length) for i in ids]
    return replace(batch, others=collate(others, packed, ids, multiple, few_shapes))


def _micro(windows: Windows, share: Share, plan: Plan) -> Micro:
    batch = batch_of(windows, share.windows, plan)
    return Micro(share, batch, int((batch.documents >= 0).sum()))


def _idle(windows: Windows, step: tuple[int, ...], plan: Plan) -> Micro:
    """The step's first window, with nothing to train and nothing to count."""
    return Micro(Share(0, ()), untrained(batch_of(windows, step[:1], plan)), 0)


def rounds(windows: Windows, per_forward: int, plan: Plan, rank: int, ranks: int) -> Iterator[Callable[[], Batch]]:
    """All windows once, in their order: chunk ``rank`` of every round of ``ranks`` chunks.

    Every rank makes as many batches; one without a chunk repeats the first window, with nothing to count.
    """
    for start in range(0, len(windows), per_forward * ranks):
        first = start + rank * per_forward
        ids = tuple(range(first, min(first + per_forward, len(windows))))
        yield partial(batch_of, windows, ids, plan) if ids else partial(_nothing, windows, plan)


def _nothing(windows: Windows, plan: Plan) -> Batch:
    return untrained(batch_of(windows, (0,), plan))


T = TypeVar("T")


def ahead(makers: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """The results of ``makers`` in their order, made up to AHEAD × workers early by ``workers`` threads."""
    if workers < 1:
        yield from (make() for make in makers)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[Future[T]] = deque()
    try:
        for make in makers:
            waiting.append(pool.submit(make))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
