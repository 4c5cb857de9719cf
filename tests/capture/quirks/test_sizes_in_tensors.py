"""Sizes that a model computes in tensors of one number are sizes of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.selection import broad_after


class Padded(nn.Module):
    """A convolution that pads to whole steps as those of Encodec do, with reflection where that is possible."""

    size: Tensor
    step: Tensor
    total: Tensor

    def __init__(self, kernel: int, stride: int, mode: str, persistent: bool = False) -> None:
        super().__init__()
        self.conv, self.mode = nn.Conv1d(4, 4, kernel, stride), mode
        size, step = torch.tensor(kernel), torch.tensor(stride)
        self.register_buffer("size", size, persistent=persistent)
        self.register_buffer("step", step, persistent=persistent)
        self.register_buffer("total", size - step, persistent=persistent)
        self.right = self.total // 2
        self.left = self.total - self.right

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        steps = torch.ceil((length - self.size + self.total) / self.step + 1).to(torch.int64) - 1
        extra = steps * self.step + self.size - self.total - length
        padding = (self.left, self.right + extra)
        if self.mode != "reflect":
            return self.convolved(F.pad(x, padding, self.mode))  # type: ignore[arg-type]
        most: Any = max(padding)
        missing: Any = 0
        if length <= most:
            missing = most - length + 1
            x = F.pad(x, (0, missing))
        padded = F.pad(x, padding, self.mode)  # type: ignore[arg-type]
        return self.convolved(padded[..., : padded.shape[-1] - missing])

    def convolved(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def codec(mode: str) -> nn.Module:
    return nn.Sequential(Padded(3, 1, mode), nn.ELU(), Padded(10, 5, mode)).double()


@pytest.mark.parametrize("mode", broad_after(1, ["constant", "reflect"]))
def test_padding_that_is_computed_of_lengths_fits_other_lengths(mode: str) -> None:
    model = codec(mode)
    gm = llfx.capture(model, (torch.randn(3, 4, 97).double(),))
    for length in (*range(60, 80), 131):
        x = torch.randn(2, 4, length).double()
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.broad
def test_a_length_for_which_the_example_would_have_been_padded_otherwise_is_refused() -> None:
    model = codec("reflect")
    gm = llfx.capture(model, (torch.randn(3, 4, 97).double(),))
    with pytest.raises(llfx.CallError, match="This graph holds for calls with"):
        gm(torch.randn(3, 4, 3).double())


def test_lengths_for_which_a_quotient_is_not_exact_in_float32_are_refused() -> None:
    model = Padded(4, 2, "reflect")
    gm = llfx.capture(model, (torch.randn(3, 4, 97),))
    with pytest.raises(llfx.CallError, match="This graph holds for calls with"):
        gm(torch.randn(2, 4, 1).expand(-1, -1, 2**22 + 2))


def test_numbers_in_buffers_that_may_change_are_not_taken_for_constants() -> None:
    model, x = Padded(4, 2, "reflect", persistent=True), torch.randn(2, 4, 50)
    gm = llfx.capture(model, (torch.randn(3, 4, 97),))
    for _ in range(2):
        torch.testing.assert_close(gm(x), model(x))
        model.total += 1


class Gridded(nn.Module):
    """Keeps the height and width of its features in a tensor, as detectors do, and makes coordinates of these."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        shapes = torch.tensor([tuple(features.shape[-2:])], dtype=torch.long, device=x.device)
        height: Any = shapes[0, 0]
        width: Any = shapes[0][1]
        grid = torch.arange(0, height)[:, None] / height + torch.arange(0, width) / width
        result: Tensor = features.flatten(2) + grid.flatten()
        return result


def test_heights_and_widths_that_are_kept_in_a_tensor_are_sizes() -> None:
    model = Gridded()
    gm = llfx.capture(model, (torch.randn(2, 3, 8, 12),))
    x = torch.randn(3, 3, 6, 14)
    torch.testing.assert_close(gm(x), model(x))
