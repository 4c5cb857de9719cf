"""`drop_metadata_asserts`: the graph runs in types other than those of capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_lite_fx.passes import (
    DropMetadataAsserts,
)
from tests.support.programs import (
    after,
    count,
)

aten = torch.ops.aten


class Casts(nn.Module):
    """Casts its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64) + 1


def test_the_assertions_go_and_the_casts_stay() -> None:
    gm = torch.export.export(Casts(), (torch.ones(2),)).module()
    dropped, report = after(gm, DropMetadataAsserts())
    target = aten._assert_tensor_metadata.default
    assert report.edits == count(gm, target) == 1
    assert count(dropped, target) == 0
    assert dropped(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
    with pytest.raises(RuntimeError, match="dtype"):
        gm(torch.ones(2, dtype=torch.bfloat16))


class CastsInARegion(nn.Module):
    """Casts its input where gradients are off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.to(torch.float64) + 1


def test_the_assertions_in_a_region_go_too() -> None:
    gm = torch.export.export(CastsInARegion(), (torch.ones(2),)).module()
    dropped, report = after(gm, DropMetadataAsserts())
    assert report.edits == 1
    assert dropped(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
