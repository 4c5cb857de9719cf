"""A forward that is written by the formula is right on a base of any type, without a cast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise, small
from tests.support.own_variants import registered
from tests.support.plain_variants import (
    PLAIN,
    PlainGate,
    PlainInputGate,
    PlainLoRA,
    PlainRotation,
    PlainWeight,
)
from tests.support.selection import broad_after


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(*PLAIN):
        yield


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def config(cls: type[llfx.Variant], **fields: Any) -> llfx.Variant:
    return small(cls, 4, alpha=6.0, target_names=(".",), **fields)


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the adapters."""
    y = model(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return y, *torch.autograd.grad(loss, llfx.adapter_parameters(model))


ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    ("cls", "dtype"),
    broad_after(1, [(PlainWeight, torch.float16), *((cls, torch.bfloat16) for cls in PLAIN)], several=True),
)
def test_a_plain_forward_is_right_on_a_base_in_half_precision(cls: type[llfx.Variant], dtype: torch.dtype) -> None:
    model, x = net(dtype), inputs(dtype)
    gm, wrapped = llfx.rewrite(model, config(cls), (x,)), llfx.wrap(model, config(cls), (x,))
    assert all(p.dtype is torch.float32 for p in llfx.adapter_parameters(gm))
    randomise(gm, 2)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    ours, theirs = results(gm, x), results(wrapped, x)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    assert ours[0].dtype is dtype
    exact = llfx.rewrite(net(dtype).double(), config(cls), (x.double(),))
    llfx.load_adapter_state_dict(exact, {k: v.double() for k, v in llfx.adapter_state_dict(gm).items()})
    for a, b in zip(ours, results(exact, x.double()), strict=True):
        assert torch.allclose(a.double(), b, rtol=0, atol=ROUNDING[dtype] * b.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    broad_after(
        2,
        [(torch.bfloat16, None), (torch.float16, torch.float64), (torch.float32, None), (torch.float32, torch.float64)],
        several=True,
    ),
)
def test_a_plain_lora_has_the_bits_of_the_packages_own(dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    model, x = net(dtype), inputs(dtype)
    gms = [llfx.rewrite(model, config(cls, dtype=adapter), (x,)) for cls in (llfx.LoRA, PlainLoRA)]
    for gm in gms:
        randomise(gm, 2)
    for a, b in zip(*(results(gm, x) for gm in gms), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", broad_after(2, [PlainLoRA, PlainGate, PlainInputGate, PlainRotation]))
def test_the_output_has_the_type_of_the_base_under_autocast(cls: type[llfx.Variant]) -> None:
    model, x = net(torch.float32), inputs(torch.float32)
    gm, wrapped = llfx.rewrite(model, config(cls), (x,)), llfx.wrap(model, config(cls), (x,))
    randomise(gm, 2)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(gm, x), results(wrapped, x)
    assert ours[0].dtype is theirs[0].dtype is torch.bfloat16
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=0, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("cls", [PlainLoRA, PlainGate, PlainInputGate, PlainWeight])
def test_a_plain_forward_folds_into_a_weight_in_half_precision(cls: type[llfx.Variant]) -> None:
    model, x = net(torch.bfloat16), inputs(torch.bfloat16)
    gm = llfx.rewrite(model, config(cls, dtype=torch.bfloat16), (x,))
    randomise(gm, 2)
    a, b = llfx.merge(gm)(x).float(), gm(x).float()
    assert torch.allclose(a, b, rtol=0, atol=3e-2 * b.abs().max().item())


def test_tensors_of_indices_keep_their_type() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Picked(llfx.Variant):
        def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
            return {
                "lora_i": llfx.ParamSpec((2,), lambda i: i.copy_(torch.tensor([1, 3])), False, torch.int64),
                "lora_B": llfx.ParamSpec((site.d_out, 2)),
            }

        def forward(self, x: Any, base: Any, p: Any) -> Any:
            return base(x) + x[..., p.lora_i] @ p.lora_B.T

    x = inputs(torch.bfloat16)
    with registered(Picked):
        gm = llfx.rewrite(net(torch.bfloat16), Picked(target_names=("0",)), (x,))
        randomise(gm, 2)
        plain = net(torch.bfloat16)
        hidden = plain[0](x) + x[..., [1, 3]].float() @ gm.get_parameter("0.lora_B").T
    assert torch.equal(gm(x), plain[2](torch.tanh(hidden.bfloat16())))
