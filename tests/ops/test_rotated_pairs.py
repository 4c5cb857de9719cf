"""The two forms of `rotated_pairs` against its formula: values, gradients of both orders, saved bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_lite_fx.ops.rotated_pairs import rotated_pairs, rotated_pairs_at_once
from tests.ops.comparing import assert_same
from tests.support.saved import saved_bytes


def plain(pairs: Tensor, straight: Tensor, crossed: Tensor) -> Tensor:
    return pairs * straight + pairs.flip(-2) * crossed


def operands(shape: tuple[int, ...], groups: int, rows: int, half: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*shape, groups, 2, half), (groups, rows, half), (groups, 2, half)]
    return [torch.randn(each, dtype=torch.float64, generator=generator).requires_grad_() for each in shapes]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    groups=st.integers(1, 3),
    rows=st.sampled_from([1, 2]),
    half=st.integers(1, 4),
    needed=st.sets(st.sampled_from([0, 1, 2]), min_size=1),
)
def test_it_equals_the_plain_operations(
    shape: tuple[int, ...], groups: int, rows: int, half: int, needed: set[int]
) -> None:
    values = operands(shape, groups, rows, half)
    assert_same(rotated_pairs_at_once, rotated_pairs, values, needed)
    assert_same(rotated_pairs, plain, values, needed)


def test_gradients_have_gradients() -> None:
    assert torch.autograd.gradgradcheck(rotated_pairs_at_once, operands((2,), 2, 1, 3))


def test_the_values_are_saved_once_and_nothing_else_of_their_size() -> None:
    values = operands((64,), 2, 1, 4)
    sizes = [value.untyped_storage().nbytes() for value in values]
    assert saved_bytes(lambda: rotated_pairs_at_once(*values)) == sum(sizes)


@pytest.mark.parametrize("of", ["types", "vmap", "jvp", "compiled"])
def test_it_is_the_plain_operations_elsewhere(of: str) -> None:
    pairs, straight, crossed = (value.detach() for value in operands((3,), 2, 2, 4))
    run: Any = rotated_pairs_at_once
    if of == "types":
        pairs = pairs.bfloat16()
        assert run(pairs, straight, crossed).dtype == torch.float64
    elif of == "vmap":
        run = torch.vmap(run, in_dims=(0, None, None))
    elif of == "compiled":
        run = torch.compile(run, fullgraph=True, backend="eager")
    else:
        tangent = torch.ones_like(pairs)
        ours, theirs = (
            torch.func.jvp(lambda x, f=f: f(x, straight, crossed), (pairs,), (tangent,)) for f in (run, plain)
        )
        torch.testing.assert_close(ours, theirs)
        return
    torch.testing.assert_close(run(pairs, straight, crossed), plain(pairs, straight, crossed), rtol=0, atol=0)
