"""FSDP2's sum of gradients by two-byte messages, on real ranks, beside torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hpcft.plan.layout import mesh
from hpcft.plan.weights import sends_narrow
from hpcft.train.reduce_scatter import AllToAllReduceScatter
from tests.plans import plan
from tests.train import small


def gradients(narrow: bool) -> list[torch.Tensor]:
    """Of two backward passes, the second added to the first, of layers whose rows three ranks do not divide."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.Linear(10, 7, bias=False), nn.Linear(7, 2))
    for unit in (*model, model):
        fully_shard(unit, **how)
        if narrow:
            unit.set_custom_reduce_scatter(AllToAllReduceScatter(torch.bfloat16))
    torch.manual_seed(1 + dist.get_rank())
    found = []
    for _ in range(2):
        model(torch.randn(5, 16, dtype=torch.bfloat16)).float().square().sum().backward()
        found += [p.grad.to_local().clone() for p in model.parameters()]
    return found


def compared(environment: Any = None) -> dict[str, Any]:
    """The largest difference of a gradient to torch's own, relative to that tensor's largest; what was sent."""
    dist.init_process_group("gloo")
    sent, exchange = set(), dist.all_to_all_single

    def watched(output: Any, given: Any, **options: Any) -> Any:
        sent.add(str(given.dtype))
        return exchange(output, given, **options)

    dist.all_to_all_single = watched  # type: ignore[assignment]
    pairs = list(zip(gradients(narrow=True), gradients(narrow=False), strict=True))
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b.numel() and b.any()]
    return {"apart": max(apart), "sent": sorted(sent), "types": sorted({str(a.dtype) for a, _ in pairs})}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_sum_of_two_byte_messages_is_that_of_four_byte_ones(ranks: int) -> None:
    for found in small.on_ranks(ranks, compared):
        assert found["apart"] < 1e-6
        assert found["sent"] == ["torch.bfloat16"]
        assert found["types"] == ["torch.float32"]


def test_after_an_error_between_two_allocations_nothing_is_summed_in_few_digits() -> None:
    half_made, nobody = AllToAllReduceScatter(torch.bfloat16), None
    half_made.allocate([2], dtype=torch.float32, device=torch.device("cpu"))  # and then an error
    taken = [half_made.allocate([n], dtype=torch.float32, device=torch.device("cpu")) for n in (2, 1)]
    group: Any = nobody
    with pytest.raises(RuntimeError, match="left half made"):
        half_made(taken[1], taken[0], group, dist.ReduceOp.SUM)


def test_another_reduction_than_a_sum_or_a_mean_is_refused() -> None:
    nobody: Any = None
    with pytest.raises(ValueError, match="summed or averaged"):
        AllToAllReduceScatter(torch.bfloat16)(torch.zeros(1), torch.zeros(2), nobody, dist.ReduceOp.MAX)


@pytest.mark.parametrize(
    ("nodes", "per_node", "degrees", "kind", "dtype", "narrow"),
    [
        (1, 4, {}, "full", "bfloat16", True),
        (1, 4, {"tp": 2}, "full", "float16", True),
        (2, 4, {"dp_replicate": 2}, "full", "bfloat16", True),
        (3, 4, {"dp_replicate": 4}, "full", "bfloat16", False),  # three ranks each, some on two nodes
        (2, 4, {}, "full", "bfloat16", False),  # a ring sends one sum from node to node
        (1, 4, {}, "lora", "bfloat16", False),  # may have been added up before, in float32
        (1, 4, {}, "full", "float32", False),
        (1, 1, {}, "full", "bfloat16", False),
    ],
)
def test_gradients_of_a_whole_model_are_sent_in_two_bytes_inside_a_node(
    nodes: int, per_node: int, degrees: dict[str, int], kind: str, dtype: str, narrow: bool
) -> None:
    how = {"tuner": {"kind": kind}, "model": {"dtype": dtype}, "layout": mesh(nodes, per_node, **degrees)}
    assert sends_narrow(plan(**how, train={"strategy": "fsdp"})) is narrow
    assert not any(sends_narrow(plan(**how, train={"strategy": name})) for name in ("ddp", "zero2", "zero3"))
