"""A policy of FSDP2 that casts parameters has its like: a base that was cast before, under float32 adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.support.ranks import on_ranks

CFG = llfx.LoRA(r=4, target_names="layers")
REDUCED = MixedPrecisionPolicy(reduce_dtype=torch.float32)
CASTING = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class _Layers(nn.Module):
    """Three layers with weights that bfloat16 holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, 6)
        self.to(torch.bfloat16).to(torch.float32)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def adapted(make: Any, dtype: torch.dtype) -> Any:
    """Return the adapted model with the same adapters in float32, or in the type that `dtype` gives them."""
    base = _Layers().to(dtype)
    model = make(base, CFG, (torch.ones(2, 16, dtype=dtype),))
    tensors = llfx.adapter_state_dict(model)
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(tensors[name].shape, generator=generator) * 0.2 for name in sorted(tensors)}
    llfx.load_adapter_state_dict(model, {name: values[name].to(tensors[name].dtype) for name in tensors})
    return model


def gradients_of(model: Any, dtype: torch.dtype, *ranks: int) -> dict[str, Tensor]:
    """Return the gradients of the mean loss of the inputs of these ranks, whole."""
    for rank in ranks:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
        (model(x.to(dtype)).to(torch.float64).square().mean() / len(ranks)).backward()
    return {name: whole(p.grad).double() for name, p in model.named_parameters() if p.grad is not None}


def gradients(rank: int) -> dict[str, Any]:
    ours = llfx.shard(adapted(llfx.rewrite, torch.bfloat16), mp_policy=REDUCED)
    policy = adapted(llfx.wrap, torch.float32)
    for layer in policy.layers:
        fully_shard(layer, mp_policy=CASTING)
    fully_shard(policy, mp_policy=CASTING)
    return {
        "ours": gradients_of(ours, torch.bfloat16, rank),
        "policy": gradients_of(policy, torch.float32, rank),
        "types": {str(parameter.dtype) for parameter in llfx.adapter_parameters(ours)},
    }


@pytest.mark.broad
def test_a_base_in_bfloat16_has_the_gradients_of_a_policy_that_casts_to_it() -> None:
    exact = gradients_of(adapted(llfx.wrap, torch.float64), torch.float64, 0, 1)
    for found in on_ranks(gradients, 2):
        assert found["types"] == {"torch.float32"}
        ours, policy = found["ours"], found["policy"]
        assert ours.keys() == policy.keys() == exact.keys()
        # Gradients of one process alone are off by a third.
        assert _difference(policy, exact) < 0.03
        assert _difference(ours, exact) < 0.03
        assert _difference(ours, policy) < 0.03


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all gradients, as a part of their norm."""
    left, right = (torch.cat([tensors[name].flatten() for name in other]) for tensors in (one, other))
    return float((left - right).norm() / right.norm())
