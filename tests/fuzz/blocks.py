"""The blocks of random nets, each of which does one thing that models do. A new block is one class here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import Attention

WIDTH = 8
BLOCKS: dict[str, type[nn.Module]] = {}
"""The blocks by name. Each maps `(batch, time, WIDTH)` to the same shape."""


def block(cls: type[nn.Module]) -> type[nn.Module]:
    """Let nets have this block."""
    BLOCKS[cls.__name__] = cls
    return cls


@block
class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


@block
class Biasless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Any:
        return x + self.fc(x)


@block
class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.act(self.up(x)))


@block
class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.fc(torch.tanh(self.fc(x)))


@block
class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x.flatten(0, 1)).view(x.shape)


@block
class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x)


@block
class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.drop(x.contiguous())


@block
class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


@block
class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(True, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x)


@block
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + self.table((x.detach().mean(-1) > 0).long())


@block
class Buffers(nn.Module):
    shift: Tensor
    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Any:
        x = x + self.shift
        return x if self.mask is None else x * self.mask


@block
class NormedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


@block
class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        weights = torch.softmax(self.router(x), -1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@block
class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            kept = torch.tanh(self.fc(x))
        return x + kept


@block
class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc(x)
            ones = torch.ones_like(y)
            lost = (ones + 0.003) - ones  # nothing in bfloat16: rounding alone would not tell that the region is gone
        return x + y.to(x.dtype) + 300 * lost.to(x.dtype)


@block
class WithoutAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return x + self.fc(x.to(self.fc.weight.dtype))


@block
class AsksGrad(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x * (2.0 if torch.is_grad_enabled() else 1.0)


@block
class AsksAutocast(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


@block
class AsksMode(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(x) if self.training else x


@block
class Counts(nn.Module):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return x * self.calls


@block
class Settings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.taps = 1.5, [1.0, 0.5]

    def forward(self, x: Tensor) -> Any:
        return x * self.gain + sum(tap * x for tap in self.taps)


@block
class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.options, self.table = SimpleNamespace(gain=1.5), [[1.0], [0.5]]

    def forward(self, x: Tensor) -> Any:
        return x * self.options.gain + sum(taps[0] * x for taps in self.table)
