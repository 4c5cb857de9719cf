"""A model with statistics, which training changes besides the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.captured import captured

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LORA = llfx.LoRA(r=2, target_names=("fc",))
STATISTICS = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]


class Counted(nn.Module):
    """Has statistics, an integer among them, and a buffer that it writes to and that is not persistent."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        self.largest.copy_(x.detach().max())
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def counted() -> Counted:
    torch.manual_seed(0)
    model: Any = Counted()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()  # type: ignore[no-any-return]


def graph() -> tuple[Any, Any]:
    """Return the model and its graph, in evaluation mode."""
    return captured(counted, inputs=(X,))


def trained(model: Any, steps: int = 2, seed: int = 1) -> Any:
    """Train the adapters of a model for a few steps, and return it in evaluation mode."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(llfx.adapter_parameters(model), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(3 * torch.randn(8, 3, 6, 6, generator=generator) + 1).square().mean().backward()
        optimizer.step()
    return model.eval()


@contextmanager
def silent() -> Iterator[None]:
    """Let a warning be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
