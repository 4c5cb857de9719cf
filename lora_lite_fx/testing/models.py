"""Small models with what real ones have: attention, gated and plain feed-forward layers, a weight used twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 20


class ResidualMLP(nn.Module):
    """A plain feed-forward layer with a norm and dropout."""

    def __init__(self, bias: bool, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc_in = nn.Linear(width, inner, bias)
        self.fc_out = nn.Linear(inner, width, bias)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the layer's output added."""
        y: Tensor = self.drop(self.fc_out(F.gelu(self.fc_in(self.norm(x)))))
        return x + y


class GatedMLP(nn.Module):
    """A gated feed-forward layer. It passes an argument by name once."""

    def __init__(self, bias: bool, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias)
        self.up = nn.Linear(width, inner, bias)
        self.down = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the layer's output added."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(input=x))
        return x + y


class Attention(nn.Module):
    """Two heads; q, k and v from three linears or from one."""

    def __init__(self, bias: bool, width: int = 8, inner: int = 12, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias) for _ in range(3))
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the layer's output added."""
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in (q, k, v))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return x + y


class FusedAttention(Attention):
    """Attention with q, k and v from one linear."""

    def __init__(self, bias: bool, width: int = 8, inner: int = 12) -> None:
        super().__init__(bias, width, inner, fused=True)


class SharedLinear(nn.Module):
    """One module that runs twice."""

    def __init__(self, bias: bool, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the layer's output added."""
        return x + torch.tanh(self.mix(torch.tanh(self.mix(x))))


class Net(nn.Module):
    """Blocks between an embedding and a head of another width; the head may be tied to the embedding."""

    def __init__(
        self, blocks: Sequence[type[nn.Module]], bias: bool, tied: bool, width: int = 8, inner: int = 12
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(block(bias, width, inner) for block in blocks)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits `(batch, length, 20)` of `ids (batch, length)`."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Return random token ids of this shape."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
