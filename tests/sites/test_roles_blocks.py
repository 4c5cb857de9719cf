"""Golden tables of plain blocks, with attention and feed-forward in every notation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.sites.test_roles_of_models import check_table
from tests.support.selection import broad_after

WIDTH, INNER, HEADS, CLASSES = 8, 12, 2, 5


def split_heads(t: Tensor) -> Tensor:
    return t.view(t.shape[0], t.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


def join_heads(t: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], WIDTH)


# Compute attention over heads. q, k, v and the result are (batch, heads, sequence, width of a head).


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(value=v, key=k, query=q)


def matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH), dim=-1).matmul(v)


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * WIDTH**-0.5) @ k.transpose(-1, -2)
    return F.dropout(scores.float().softmax(-1), 0.1).type_as(v) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores = scores.masked_fill(scores > 100, -1e9)
    return F.softmax(50 * torch.tanh(scores / 50), dim=-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", probabilities, v)


def einsum_key_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swap the factors of an einsum: the softmax still runs over the keys."""
    probabilities = torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1)
    return torch.einsum("bhkd,bhqk->bhqd", v, probabilities)


def einsum_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Permute an operand by an einsum, as XLNet does with its mask."""
    scores = torch.einsum("ibnd,jbnd->bnij", q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3))
    mask = torch.einsum("ijbn->bnij", (scores > 100).to(scores.dtype).permute(2, 3, 0, 1))
    probabilities = (scores - 1e9 * mask).softmax(3)
    return torch.einsum("bnij,jbnd->ibnd", probabilities, v.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)


def matmul_key_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute transposed scores. The softmax still runs over the keys."""
    return torch.softmax(k @ q.transpose(-1, -2), dim=-2).transpose(-1, -2) @ v


def scores_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute transposed scores, and transpose them back before the softmax."""
    return torch.softmax((k @ q.transpose(-1, -2)).transpose(-1, -2), dim=-1) @ v


def value_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the transposed result from transposed probabilities."""
    probabilities = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
    return (v.transpose(-1, -2) @ probabilities.transpose(-1, -2)).transpose(-1, -2)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slice keys and values by bounds that are values of the graph."""
    keys = q.shape[2]
    return torch.softmax(q @ k[:, :, :keys].transpose(-1, -2), dim=-1) @ v[:, :, :keys]


def batched(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (-1, HEADS))


def batched_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bias = torch.zeros(1, 1, 1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ATTENTIONS: list[Attend] = [
    fused,
    fused_by_keyword,
    matmuls,
    operators,
    masked,
    einsum,
    einsum_key_first,
    einsum_mask,
    matmul_key_first,
    scores_transposed,
    value_first,
    windowed,
    batched,
    batched_with_bias,
]


class Attention(nn.Module):
    """Pre-norm attention with a residual, then the head."""

    def __init__(self, attend: Attend = fused) -> None:
        super().__init__()
        self.attend = attend
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def mix(self, x: Tensor, memory: Tensor) -> Any:
        heads = split_heads(self.q(x)), split_heads(self.k(memory)), split_heads(self.v(memory))
        return self.o(join_heads(self.attend(*heads)))

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        return self.head(x + self.mix(h, h))


WRITER = "o      output writer    8  8\n"
ATTENTION = f"""
q      query reader     8  8
k      key reader       8  8
v      value reader     8  8
{WRITER}
head   head reader      8  5
"""


class PostNormAttention(Attention):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(x + self.mix(x, x)))


class AttentionAlone(Attention):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.mix(x, x))


NO_RESIDUAL = """
q      query     8  8
k      key       8  8
v      value     8  8
o      output    8  8
head   head      8  5
"""


class WithoutProjection(Attention):
    """Attention without an output projection: the heads are added to the stream directly."""

    def forward(self, x: Tensor) -> Any:
        heads = self.attend(split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x)))
        return self.head(x + join_heads(heads))


class CrossAttention(Attention):
    def forward(self, x: Tensor, memory: Tensor) -> Any:  # type: ignore[override]  # takes one input more
        return self.head(x + self.mix(self.norm(x), memory))


CROSS = """
q      query reader     8  8
k      key inner        8  8
v      value inner      8  8
o      output writer    8  8
head   head reader      8  5
"""


class FusedProjection(nn.Module):
    """One linear for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.chunk(3, dim=-1)
        return split_heads(q), split_heads(k), split_heads(v)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.split(self.qkv(x))
        return self.head(x + self.o(join_heads(fused(q, k, v))))


class Unbound(FusedProjection):
    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(qkv.shape[0], qkv.shape[1], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        return q, k, v


class Sliced(FusedProjection):
    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv[..., :WIDTH], qkv[..., WIDTH : 2 * WIDTH], qkv[..., 2 * WIDTH :]
        return split_heads(q), split_heads(k), split_heads(v)


class SplitBySize(FusedProjection):
    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = torch.split(qkv, WIDTH, dim=2)
        return split_heads(q), split_heads(k), split_heads(v)


FUSED = """
qkv    query key value reader    8  24
o      output writer             8   8
head   head reader               8   5
"""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, INNER)
        self.fc2 = nn.Linear(INNER, WIDTH, bias=False)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(x + self.drop(self.fc2(F.gelu(self.fc1(self.norm(x))))))


class PostNormMLP(MLP):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.fc2(F.relu(self.fc1(x))) + x))


MLP_TABLE = """
fc1    up reader      8  12
fc2    down writer   12   8
head   head reader    8   5
"""


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, INNER)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


GATED = """
gate   gate reader    8  12
up     up reader      8  12
down   down writer   12   8
head   head reader    8   5
"""


class FusedGateMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.head(x + self.down(up * F.silu(gate)))


FUSED_GATE = """
gate_up   gate up reader    8  24
down      down writer      12   8
head      head reader       8   5
"""


class TwoHeads(Attention):
    """A model that returns the results of two heads in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.value_head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        x = x + self.mix(x, x)
        return {"logits": self.head(x), "value": torch.tanh(self.value_head(x)).squeeze(-1)}


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{f"attention-{attend.__name__}": (functools.partial(Attention, attend), ATTENTION) for attend in ATTENTIONS},
    "attention-post-norm": (PostNormAttention, ATTENTION),
    "attention-alone": (AttentionAlone, NO_RESIDUAL),
    "attention-without-projection": (WithoutProjection, ATTENTION.replace(WRITER, "")),
    "attention-cross": (CrossAttention, CROSS),
    "qkv-chunk": (FusedProjection, FUSED),
    "qkv-view-unbind": (Unbound, FUSED),
    "qkv-slices": (Sliced, FUSED),
    "qkv-split": (SplitBySize, FUSED),
    "mlp-pre-norm": (MLP, MLP_TABLE),
    "mlp-post-norm": (PostNormMLP, MLP_TABLE),
    "mlp-gated": (GatedMLP, GATED),
    "mlp-fused-gate": (FusedGateMLP, FUSED_GATE),
    "two-heads": (TwoHeads, ATTENTION + "value_head head reader 8 1"),
}


def example(model: nn.Module, exported: bool) -> tuple[Tensor, ...] | None:
    inputs = (torch.zeros(2, 3, WIDTH), torch.zeros(2, 4, WIDTH))
    return inputs[: 1 + isinstance(model, CrossAttention)] if exported else None


both_captures = pytest.mark.parametrize("exported", broad_after(1, [True, False]), ids=["exported", "traced"])


@both_captures
@pytest.mark.parametrize("name", broad_after(6, BLOCKS))
def test_block_has_the_sites_and_roles_of_its_table(name: str, exported: bool) -> None:
    build, golden = BLOCKS[name]
    model = build()
    check_table(llfx.inspect(model, example(model, exported)), golden)
