"""`DroppedProduct`: the numbers of dropout and a product, with a bit of the mask for each element saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lora_lite_fx.ops.dropped_product import DroppedProduct
from tests.support.conformance import close


def operands(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, a = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (shape, (3, shape[-1])))
    return x.to(dtype).requires_grad_(), a.to(dtype).requires_grad_()


def plain(x: Tensor, a: Tensor, probability: float) -> Tensor:
    return F.linear(F.dropout(x, probability), a)


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (1, 1), (2, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_operations(
    probability: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found: list[list[Tensor]] = []
    for function in (plain, lambda x, a, p: DroppedProduct(p)(x, a, True)):
        x, a = operands(*shape, dtype=dtype)
        torch.manual_seed(1)
        t = function(x, a, probability)
        t.square().sum().backward()
        assert x.grad is not None
        assert a.grad is not None
        found.append([t, x.grad, a.grad, torch.rand(2)])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-12 if dtype is torch.float64 else 2e-2, "value")
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][3], found[1][3])


def test_gradients_of_gradients() -> None:
    x, a = operands(3, 5)

    def product(x: Tensor, a: Tensor) -> Tensor:
        torch.manual_seed(1)
        return DroppedProduct(0.4)(x, a, True)

    assert torch.autograd.gradcheck(product, (x, a))
    assert torch.autograd.gradgradcheck(product, (x, a))


def test_a_bit_is_saved_for_each_element() -> None:
    x, a = operands(64, 128)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        DroppedProduct(0.1)(x, a, True)
    others = [
        tensor for tensor in saved if tensor is not x and tensor is not a and tensor.shape not in (x.shape, a.shape)
    ]
    assert [(tensor.numel(), tensor.dtype) for tensor in others] == [(64 * 128 // 8, torch.uint8)]


def test_without_training_nothing_is_dropped() -> None:
    x, a = operands(3, 5)
    assert torch.equal(DroppedProduct(0.5)(x, a, False), F.linear(x, a))


def test_compiled_and_in_transforms_it_is_the_plain_operations() -> None:
    x, a = operands(3, 5)
    product: Any = DroppedProduct(0.5)

    def summed(a: Tensor) -> Tensor:
        total: Tensor = product(x.detach(), a, True).sum()
        return total

    torch.manual_seed(1)
    expected = torch.autograd.grad(summed(a), a)[0]
    torch.manual_seed(1)
    close(torch.func.grad(summed)(a.detach()), expected, 1e-12, "in a transform")
    torch.manual_seed(1)
    compiled = torch.compile(summed, backend="eager")(a)
    torch.manual_seed(1)
    close(compiled, summed(a), 1e-12, "compiled")


def test_a_copy_of_a_module_that_holds_it_can_be_made() -> None:
    module = nn.Module()
    vars(module)["product"] = DroppedProduct(0.5)
    assert copy.deepcopy(module).product == DroppedProduct(0.5)
