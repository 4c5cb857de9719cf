"""The two forms of `rotated_blocks` against its formula: values, gradients of both orders, saved bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_lite_fx.ops.rotated_blocks import RotatedBlocks, rotated_blocks
from tests.ops.comparing import assert_same
from tests.support.saved import saved_bytes

rotated: Any = RotatedBlocks()


def plain(x: Tensor, blocks: Tensor) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)
    return x + x @ matrix


def twice(half: Tensor, blocks: Tensor) -> Tensor:
    """Return the rotation of `2 half`, which the backward pass makes of `half` and a number."""
    operation = RotatedBlocks(recipe=lambda _, half, factor: (factor * half,), sources=2)
    return operation(2 * half, blocks, half, 2)


def operands(shape: tuple[int, ...], count: int, size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*shape, count * size), (count, size, size)]
    return [torch.randn(each, dtype=torch.float64, generator=generator).requires_grad_() for each in shapes]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(), (3,), (2, 3), (0, 3), (300,), (2, 2, 150)]),  # fewer and more rows than are read at once
    count=st.integers(1, 3),
    size=st.integers(1, 4),
    needed=st.sets(st.sampled_from([0, 1]), min_size=1),
    is_transposed=st.booleans(),
)
def test_it_equals_the_plain_operations(
    shape: tuple[int, ...], count: int, size: int, needed: set[int], is_transposed: bool
) -> None:
    values = operands(shape, count, size)
    if is_transposed and len(shape) == 2:
        values[0] = values[0].detach().transpose(0, 1)
    assert_same(rotated, rotated_blocks, values, needed)
    assert_same(rotated_blocks, plain, values, needed)


@pytest.mark.parametrize("function", [rotated, twice])
def test_gradients_have_gradients(function: Any) -> None:
    assert torch.autograd.gradgradcheck(function, operands((2,), 2, 3))


def test_gradients_can_be_batched() -> None:
    x, blocks = operands((3,), 2, 2)
    gradients = torch.randn(5, 3, 4, dtype=x.dtype)
    ours, theirs = (
        torch.autograd.grad(function(x, blocks), [x, blocks], gradients, is_grads_batched=True)
        for function in (rotated, plain)
    )
    torch.testing.assert_close(ours, theirs)


def test_the_input_is_saved_once_or_what_it_was_made_of() -> None:
    x, blocks = operands((64,), 2, 4)
    sizes = [value.untyped_storage().nbytes() for value in (x, blocks)]
    assert saved_bytes(lambda: rotated(x, blocks)) == sum(sizes)
    assert saved_bytes(lambda: twice(x, blocks)) == sum(sizes)  # and not twice x


@pytest.mark.parametrize("of", ["types", "autocast", "bfloat16", "vmap", "jvp", "compiled"])
def test_it_is_the_plain_operations_elsewhere(of: str) -> None:
    x, blocks = (value.detach().float() for value in operands((3,), 2, 4))

    def written(x: Tensor, blocks: Tensor) -> Tensor:
        return x + torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (2, 4)), blocks).flatten(-2)

    run: Any = rotated
    if of == "types":
        x = x.bfloat16()
        with pytest.raises(RuntimeError):  # as the plain operations do
            written(x, blocks)
        with pytest.raises(RuntimeError):
            run(x, blocks)
        return
    if of == "bfloat16":
        x, blocks = x.bfloat16(), blocks.bfloat16()
    elif of == "vmap":
        run = torch.vmap(rotated, in_dims=(0, None))
    elif of == "compiled":
        run = torch.compile(rotated, fullgraph=True, backend="eager")
    elif of == "jvp":
        tangent = torch.ones_like(x)
        ours, theirs = (torch.func.jvp(lambda x, f=f: f(x, blocks), (x,), (tangent,)) for f in (run, written))
        torch.testing.assert_close(ours, theirs)
        return
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=of == "autocast"):
        torch.testing.assert_close(run(x, blocks), written(x, blocks), rtol=0, atol=0)
