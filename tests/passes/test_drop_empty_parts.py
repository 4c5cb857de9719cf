"""`drop_empty_parts`: what is appended to a cache that is empty has its own type, under autocast too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_lite_fx.passes import DropEmptyParts
from tests.support.programs import after

aten = torch.ops.aten


class Appends(nn.Module):
    """Appends the product of its input to tensors: to one without elements, and to one more."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        super().__init__()
        self.linear, self.dtype, self.size = nn.Linear(4, 4), dtype, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones(self.size, dtype=self.dtype), self.linear(x).flatten()])


def exported(dtype: torch.dtype, size: int) -> torch.fx.GraphModule:
    return torch.export.export(Appends(dtype, size), (torch.randn(2, 4),)).module()


def test_the_empty_part_goes_and_with_it_its_type() -> None:
    gm, x = exported(torch.float32, 0), torch.randn(2, 4)
    dropped, report = after(gm, DropEmptyParts())
    assert report.edits == 1
    assert torch.equal(dropped(x), gm(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gm(x).dtype == torch.float32
        assert dropped(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 0), (torch.float32, 1)])
def test_a_part_that_is_not_empty_or_of_another_type_stays(dtype: torch.dtype, size: int) -> None:
    gm, x = exported(dtype, size), torch.randn(2, 4)
    dropped, report = after(gm, DropEmptyParts())
    assert report.edits == 0
    assert torch.equal(dropped(x), gm(x))
    assert dropped(x).dtype == dtype


class Picks(nn.Module):
    """Joins the elements that a mask shows, however many these are."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([x[mask], x.flatten()])


def test_a_part_whose_size_follows_from_values_stays() -> None:
    x, mask = torch.randn(2, 4), torch.rand(2, 4) > 0.5
    gm = torch.export.export(Picks(), (x, mask)).module()
    same, report = after(gm, DropEmptyParts())
    assert report.edits == 0
    assert torch.equal(same(x, mask), gm(x, mask))
