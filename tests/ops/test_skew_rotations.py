"""The two forms of `neumann_rotations` against its formula: values, gradients, and the types of what is saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_lite_fx.ops.skew_rotations import neumann_rotations, neumann_rotations_in_float32
from tests.ops.comparing import assert_same


def formula(upper: Tensor) -> Tensor:
    (size,) = (b for b in range(2, 10) if b * (b - 1) // 2 == upper.shape[1])
    matrices = []
    for row in upper.double():
        matrix = row.new_zeros(size, size)
        matrix[tuple(torch.triu_indices(size, size, 1))] = row
        q = matrix - matrix.T
        matrices.append(2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return torch.stack(matrices).to(upper.dtype)


def upper(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(3, size * (size - 1) // 2, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_it_equals_the_formula(size: int, dtype: torch.dtype) -> None:
    assert_same(neumann_rotations_in_float32, neumann_rotations, [upper(size, dtype)], {0})
    assert_same(neumann_rotations, formula, [upper(size, dtype)], {0})


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_fast_form_is_in_float32_unless_autocast_lowers_that(autocast: bool) -> None:
    dtypes = set()

    def pack(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = neumann_rotations_in_float32(upper(4).requires_grad_())
    assert result.dtype == torch.float32
    assert dtypes - {torch.int64} == {torch.float64 if autocast else torch.float32}
    torch.testing.assert_close(result, neumann_rotations(upper(4)))
