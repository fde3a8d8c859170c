"""AdamW's compiled step is torch's fused one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from hpcft.run.manifest import PARTS
from hpcft.train import adamw
from tests.plans import plan

CPU, RATE = torch.device("cpu"), 1e-2
OPTIM = dataclasses.replace(plan().optim, weight_decay=0.1)
SIZES = ((40, 30), (8, 8), (300,), (5,))  # large and small, of matrices, which decay, and of others


@pytest.fixture(autouse=True)
def some_are_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adamw, "LARGE", 100)
    monkeypatch.setattr(adamw, "_update", adamw._update)
    monkeypatch.setattr(adamw, "_compiled_for", "")
    yield
    torch._dynamo.reset()


class Trained:
    """Some masters, their working copies where they have another type, and their optimizer."""

    def __init__(self, kind: torch.dtype) -> None:
        torch.manual_seed(0)
        self.masters = [torch.randn(size).to(kind) for size in SIZES]
        self.copies = {m: torch.zeros_like(m, dtype=torch.bfloat16) for m in self.masters if kind is torch.float32}
        self.optimizer = adamw.build(self.masters, OPTIM)

    def step(self, number: int, divisor: float = 1.0, good: float = 1.0) -> None:
        torch.manual_seed(number)
        for master in self.masters:
            master.grad = torch.randn(master.shape).to(master.dtype)
        rate = RATE / number
        adamw.step(self.optimizer, rate, torch.tensor(divisor), torch.tensor(good), self.copies)

    def state(self) -> list[torch.Tensor]:
        parts = [adamw.part_of(self.optimizer, m, part).clone() for m in self.masters for part in PARTS]
        counts = [self.optimizer.state[m]["step"].clone() for m in self.masters]
        return [*parts, *counts, *(copy.clone() for copy in self.copies.values())]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_steps_of_large_masters_are_those_of_torch(kind: torch.dtype, compiled: bool) -> None:
    theirs, ours = Trained(kind), Trained(kind)
    for number in (1, 2, 3):
        theirs.step(number, divisor=1.7)
    if compiled:
        adamw.compile_arithmetic(CPU)
    else:
        adamw._compiled_for = "cpu"
    for number in (1, 2, 3):
        ours.step(number, divisor=1.7)
    for a, b in zip(ours.state(), theirs.state(), strict=True):
        exact = 1e-6 if a.dtype is torch.float32 else 2**-7  # a rounding of bfloat16 may fall to either side
        torch.testing.assert_close(a, b, rtol=exact, atol=1e-7)
    for master, copy in ours.copies.items():
        assert torch.equal(copy, master.bfloat16())


def test_a_step_that_is_not_good_leaves_everything_as_it_is() -> None:
    adamw._compiled_for = "cpu"
    trained = Trained(torch.float32)
    trained.step(1)
    before = trained.state()
    trained.step(2, divisor=float("nan"), good=0.0)
    for a, b in zip(trained.state(), before, strict=True):
        assert torch.equal(a, b)


def test_masters_elsewhere_than_the_program_is_for_are_torch_s() -> None:
    adamw._compiled_for, adamw._update = "cuda", None  # type: ignore[assignment]
    Trained(torch.float32).step(1)


def test_a_step_goes_on_from_moments_of_a_checkpoint() -> None:
    adamw._compiled_for = "cpu"
    whole, resumed = Trained(torch.float32), Trained(torch.float32)
    for number in (1, 2):
        whole.step(number)
    for old, new in zip(whole.masters, resumed.masters, strict=True):
        new.copy_(old)
        moments = {part: adamw.part_of(whole.optimizer, old, part).clone() for part in adamw.MOMENTS}
        adamw.set_moments(resumed.optimizer, new, moments, 2)
    whole.step(3)
    resumed.step(3)
    for a, b in zip(whole.state(), resumed.state(), strict=True):
        assert torch.equal(a, b)
