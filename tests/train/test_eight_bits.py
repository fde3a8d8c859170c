"""A base in 8-bit floats: how exact its products are, and that it trains alike on every strategy that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcft.plan.plan import Plan
from hpcft.train import eight_bits
from hpcft.train.eight_bits import EightBits, by_rows
from tests.train import equivalence, families, small
from tests.train.test_quantise import SPREAD, built

HALF_STEP = 2.0**-4  # of e4m3's three bits behind the leading one


def packed(inputs: int = 64, outputs: int = 48, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, EightBits]:
    """A linear of rows of very different size, and the same in 8 bits."""
    torch.manual_seed(5)
    linear = nn.Linear(inputs, outputs).to(dtype)
    linear.weight.data *= torch.logspace(-6, 3, outputs)[:, None]
    made = EightBits(linear, dtype)
    made.weight = nn.Parameter(made.pack(linear.weight.data), requires_grad=False)
    return linear, made


def test_a_number_is_off_by_half_a_step_of_its_own_and_a_row_of_zeros_stays_zero() -> None:
    torch.manual_seed(1)
    numbers = torch.randn(16, 256) * torch.logspace(-20, 20, 16)[:, None]
    numbers[3] = 0
    eight, scales = by_rows(numbers)
    back = eight.float() * scales
    smallest = numbers.abs().amax(1, keepdim=True) * 2**-9 / 448 * 2  # below it e4m3 has fixed steps
    assert bool(((back - numbers).abs() <= HALF_STEP * numbers.abs() + smallest).all())
    assert back[3].abs().sum() == 0


def test_products_are_within_a_few_hundredths_in_both_passes_whatever_the_size_of_rows() -> None:
    linear, made = packed()
    x = torch.randn(5, 7, 64) * torch.logspace(-3, 3, 5)[:, None, None]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    upstream = torch.randn(5, 7, 48)
    outputs = [module(one) for module, one in zip((linear, made), inputs, strict=True)]
    for row in range(5):
        exact, ours = (out[row] - linear.bias for out in outputs)
        assert error(ours, exact) < 0.05
    for out in outputs:
        (out * upstream).sum().backward()
    gradients = [one.grad for one in inputs]
    assert error(gradients[1], gradients[0]) < 0.05


def error(ours: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert ours is not None
    assert exact is not None
    return float(((ours - exact).norm() / exact.norm()).detach())


def test_the_gradient_is_that_of_the_very_weights_of_the_forward_pass() -> None:
    _, made = packed()
    weight = made.weight.view(eight_bits.KIND).view(48, 64).float() * made.scales
    x = torch.zeros(1, 64, requires_grad=True)
    for output in (0, 20, 47):  # a gradient of one number is exact in 8 bits
        x.grad = None
        made(x)[0, output].backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad[0], weight[output])


def test_the_kernel_of_gpus_gives_what_is_multiplied_in_its_place_elsewhere() -> None:
    torch.manual_seed(2)
    (a, rows), (b, columns) = by_rows(torch.randn(32, 64)), by_rows(torch.randn(48, 64))
    try:
        kernel = torch._scaled_mm(a, b.t(), scale_a=rows, scale_b=columns.t().contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError) as why:
        pytest.skip(f"this release of torch has no such kernel for CPUs: {why}")
    ours = eight_bits._multiplied(a, rows, b.t(), columns.t(), torch.bfloat16)
    torch.testing.assert_close(ours, kernel, rtol=0.01, atol=1e-3)


def plan_for(base: Path, strategy: str = "ddp", degrees: dict[str, int] | None = None, **changes: Any) -> Plan:
    model = {"path": str(base), "from_scratch": False, "quantization": "fp8", **changes.pop("model", {})}
    return families.plan_with(base, strategy, degrees or {"dp": 1}, "lora", model=model, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("base") / "phi", "phi")  # every linear has a bias


@pytest.mark.parametrize("spread", SPREAD)
def test_every_strategy_that_takes_it_gives_the_losses_and_norms_of_one_process(
    base: Path, tmp_path: Path, spread: str
) -> None:
    prepared = small.Prepared(small.windows(22))
    one = equivalence.trained(plan_for(base), tmp_path / "one", prepared)
    many = equivalence.trained(plan_for(base, *SPREAD[spread]), tmp_path / "many", prepared)
    # Sums in another order now and then round a number to the next one of 8 bits.
    assert equivalence.difference(many, one) < 2e-4


def test_the_losses_are_close_to_those_of_the_whole_base(base: Path, tmp_path: Path) -> None:
    prepared = small.Prepared(small.windows(22))
    curves = [
        equivalence.trained(plan_for(base, model={"quantization": kind}), tmp_path / kind, prepared)
        for kind in ("fp8", "none")
    ]
    losses = [[loss for loss, _ in curve] for curve in curves]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_byte_a_weight_stays_and_no_copy_of_it_in_full(base: Path) -> None:
    sharded = built(plan_for(base, model={"dtype": "bfloat16"}))
    shapes, packs = sharded.skeleton.shapes, sharded.skeleton.packs
    frozen = {n: p for n, p in sharded.model.named_parameters() if not p.requires_grad}
    assert len(packs) == 2 * 6
    assert sum(p.numel() * p.element_size() for n, p in frozen.items() if n in packs) == sum(
        shapes[n][0] * shapes[n][1] for n in packs
    )
    whole = [n for n, p in frozen.items() if n not in packs and p.dim() == 2]
    assert [n.rpartition("model.")[2] for n in whole] == ["embed_tokens.weight", "lm_head.weight"]


def test_a_linear_that_the_kernels_cannot_take_stays_whole() -> None:
    assert eight_bits.fits(nn.Linear(32, 16))
    assert not eight_bits.fits(nn.Linear(32, 24))
    assert not eight_bits.fits(nn.Linear(8, 16))
