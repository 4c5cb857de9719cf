"""Variants whose update is an elementwise or Kronecker product, or made of blocks: their formulas, written out entry
by entry, and their traps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx

from .test_variants import BF16, F64, close, gradients, randomised, ready, sample, tensors

D_IN, D_OUT = 18, 24
FC: dict[str, Any] = {"target_names": ("fc",)}
CONFIGS = {
    "LoHa": llfx.LoHa(r=2, alpha=3.0, **FC),
    "LoHa of a high rank": llfx.LoHa(r=8, alpha=3.0, **FC),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def single(d_in: int = D_IN, d_out: int = D_OUT, dtype: torch.dtype = F64) -> Any:
    return ready(nn.Sequential(OrderedDict(fc=nn.Linear(d_in, d_out))), dtype)


def entries(entry: Callable[[int, int], Tensor], d_out: int = D_OUT, d_in: int = D_IN) -> Tensor:
    return torch.stack([torch.stack([entry(i, j) for j in range(d_in)]) for i in range(d_out)])


def update(name: str, w: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What a variant adds to the weight, entry by entry."""
    cfg = CONFIGS[name]
    if isinstance(cfg, llfx.LoHa):
        s = cfg.alpha / cfg.r
        return entries(lambda i, j: s * p["B1"][i].dot(p["A1"][:, j]) * p["B2"][i].dot(p["A2"][:, j]))
    raise AssertionError(name)


@every_config
def test_outputs_gradients_and_merged_weights_are_those_of_the_formula(name: str) -> None:
    model, x = single(), sample(3, 5, D_IN)
    gm, wrapped = (randomised(how(model, CONFIGS[name])) for how in (llfx.rewrite, llfx.wrap))
    p = {key: tensor.clone().requires_grad_() for key, tensor in tensors(gm, "fc").items()}
    weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
    weight = weight + update(name, weight, p)
    assert (weight - model.fc.weight).abs().max() > 0.1, "the adapter does nothing"
    expected = F.linear(x, weight, bias)
    (expected * sample(*expected.shape, seed=7)).sum().backward()
    for adapted in (gm, wrapped):
        grads = gradients(adapted, adapted(x))
        assert grads.keys() == {f"fc.lora_{key}" for key in p}
        for key, tensor in p.items():
            close(grads[f"fc.lora_{key}"], tensor.grad)
        close(adapted(x), expected)
        close(adapted(x[0, 0]), expected[0, 0])
    merged = llfx.merge(gm)
    close(merged.get_parameter("fc.weight").detach(), weight.detach())
    close(merged.get_parameter("fc.bias").detach(), bias)


@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("dtype", [F64, torch.float32, BF16], ids=str)
@every_config
def test_start_is_the_identity_exactly(name: str, dtype: torch.dtype, how: Any) -> None:
    model, x = single(dtype=dtype), sample(5, 3, D_IN, dtype=dtype)
    assert torch.equal(how(model, CONFIGS[name])(x), model(x))


@every_config
def test_nothing_is_dead_after_two_steps(name: str) -> None:
    torch.manual_seed(0)
    gm, x = llfx.rewrite(single(), CONFIGS[name]), sample(5, 3, D_IN)
    optimizer = torch.optim.SGD(llfx.adapter_parameters(gm), lr=1e-3)
    for _ in range(2):
        gradients(gm, gm(x))
        optimizer.step()
    for parameter, grad in gradients(gm, gm(x)).items():
        assert (grad != 0).all(), parameter


@every_config
def test_a_bfloat16_base_and_autocast_keep_the_dtype_of_the_output(name: str) -> None:
    half, full = single(dtype=BF16), single(dtype=torch.float32)
    x, expected = sample(3, 5, D_IN), randomised(llfx.rewrite(single(), CONFIGS[name]))(sample(3, 5, D_IN)).detach()
    gm = randomised(llfx.rewrite(half, CONFIGS[name]))
    assert {tensor.dtype for tensor in llfx.adapter_state_dict(gm).values()} == {torch.float32}
    with torch.autocast("cpu", BF16):
        outputs = [randomised(llfx.rewrite(full, CONFIGS[name]))(x.float())]
    for y in (*outputs, gm(x.to(BF16))):
        assert y.dtype == BF16
        assert (y - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_loha_has_the_squared_rank_and_forms_no_weight_where_factors_are_cheaper(r: int) -> None:
    model = single()
    gm = randomised(llfx.rewrite(model, llfx.LoHa(r=r, **FC)))
    change = llfx.merge(gm).get_parameter("fc.weight") - model.fc.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == r**2
    products = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.name.startswith("mul")]
    assert ((D_OUT, D_IN) in products) == (r == 4)


def test_loha_takes_no_rank_above_the_smaller_side() -> None:
    with pytest.raises(llfx.ConfigError, match="use r <= 18"):
        llfx.rewrite(single(), llfx.LoHa(r=19, **FC))
