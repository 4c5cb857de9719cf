"""Golden tables of blocks in the notation of some architectures, and of blocks that only look like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.sites.test_roles_blocks import CLASSES, INNER, WIDTH, both_captures, fused, join_heads, split_heads
from tests.sites.test_roles_of_models import check_table
from tests.support.selection import broad_after

RANK, EXPERTS = 4, 3


class Block(nn.Module):
    """Linears by name, and a head. A subclass computes the additions to the stream."""

    linears: tuple[tuple[str, int, int], ...] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a linear by its name."""

    def __init__(self) -> None:
        super().__init__()
        for name, d_in, d_out in self.linears:
            setattr(self, name, nn.Linear(d_in, d_out))
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.head(x + self.branch(self.norm(x)))


_QKVO = tuple((name, WIDTH, WIDTH) for name in ("q", "k", "v", "o"))
_MLP = (("fc1", WIDTH, INNER), ("fc2", INNER, WIDTH))
HEAD = "head head reader 8 5\n"
QKVO = "q query reader 8 8\nk key reader 8 8\nv value reader 8 8\no output writer 8 8\n"
MLP = "fc1 up reader 8 12\nfc2 down writer 12 8\n"


class Parallel(Block):
    """Attention and feed-forward that both read the same stream. Their results are added to it in turn."""

    linears = _QKVO + _MLP

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        heads = fused(split_heads(self.q(h)), split_heads(self.k(h)), split_heads(self.v(h)))
        return self.head(x + self.o(join_heads(heads)) + self.fc2(F.gelu(self.fc1(h))))


class Latent(Block):
    """Attention whose queries pass a low rank. Keys and values share another low rank."""

    linears = (
        ("q_a", WIDTH, RANK),
        ("q_b", RANK, WIDTH),
        ("kv_a", WIDTH, RANK),
        ("kv_b", RANK, 2 * WIDTH),
        ("o", WIDTH, WIDTH),
    )

    def branch(self, x: Tensor) -> Any:
        k, v = self.kv_b(self.kv_a(x)).chunk(2, dim=-1)
        return self.o(join_heads(fused(split_heads(self.q_b(self.q_a(x))), split_heads(k), split_heads(v))))


LATENT = """
q_a query reader 8 4
q_b query inner 4 8
kv_a key value reader 8 4
kv_b key value inner 4 16
o output writer 8 8
"""


class Narrowed(Block):
    """Attention within a narrower space. The linear that narrows is not a projection of queries, keys or values."""

    linears = (
        ("narrow", WIDTH, RANK),
        ("q", RANK, WIDTH),
        ("k", RANK, WIDTH),
        ("v", RANK, WIDTH),
        ("o", WIDTH, WIDTH),
    )

    def branch(self, x: Tensor) -> Any:
        x = self.narrow(x)
        return self.o(join_heads(fused(split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x)))))


NARROWED = "narrow reader 8 4\nq query inner 4 8\nk key inner 4 8\nv value inner 4 8\no output writer 8 8\n"


class Written(Block):
    """Attention that writes its keys into an empty tensor, part by part."""

    linears = (*_QKVO, ("k2", WIDTH, WIDTH))

    def branch(self, x: Tensor) -> Any:
        keys = torch.empty_like(split_heads(x))
        keys[..., :2] = split_heads(self.k(x))[..., :2]
        keys[..., 2:] = split_heads(self.k2(x))[..., 2:]
        return self.o(join_heads(fused(split_heads(self.q(x)), keys, split_heads(self.v(x)))))


class RelativePositions(Block):
    """Attention that adds scores with projected positions to the scores with keys."""

    linears = (*_QKVO, ("position", WIDTH, WIDTH))

    def branch(self, x: Tensor) -> Any:
        q, k, v = split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))
        positions = split_heads(self.position(torch.cumsum(torch.ones_like(x), dim=1)))
        scores = q @ k.transpose(-1, -2) + (q + 1) @ positions.transpose(-1, -2)
        return self.o(join_heads(scores.softmax(-1) @ v))


class GLU(Block):
    linears = (("gate_up", WIDTH, 2 * INNER), ("down", INNER, WIDTH))

    def branch(self, x: Tensor) -> Any:
        return self.down(F.glu(self.gate_up(x)))


class SquaredReLU(Block):
    linears = _MLP

    def branch(self, x: Tensor) -> Any:
        return self.fc2(torch.square(F.relu(self.fc1(x))))


class GatedRecurrence(Block):
    """A recurrence, gated by an activation, which is not a feed-forward block."""

    linears = (("gate", WIDTH, INNER), ("state", WIDTH, INNER), ("out", INNER, WIDTH))

    def branch(self, x: Tensor) -> Any:
        return self.out(torch.cumsum(self.state(x), dim=1) * F.silu(self.gate(x)))


class Routed(Block):
    """A mixture of experts: a router chooses the experts of each token."""

    linears = (("router", WIDTH, EXPERTS),)

    def branch(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(self.router(x), dim=-1), 2, dim=-1)
        through = torch.einsum("bti,btkij->btkj", x, self.experts[chosen])
        return (through * weights.unsqueeze(-1)).sum(-2)


class ChosenByFirst(Block):
    """A choice of rows in a table. It is not a router, because no token is multiplied by these rows."""

    linears = (("scores", WIDTH, EXPERTS), ("out", WIDTH, WIDTH))

    def branch(self, x: Tensor) -> Any:
        _, chosen = torch.topk(self.scores(x), 1, dim=-1)
        return self.out(self.experts[:, 0][chosen.squeeze(-1)])


class TopClasses(Block):
    """A model that returns the largest outputs of its head."""

    def forward(self, x: Tensor) -> Any:
        values, classes = torch.topk(self.head(self.norm(x)), 2, dim=-1)
        return values, classes


class TopTokens(Block):
    """A block that adds the tokens with the best scores to the stream."""

    linears = (("score", WIDTH, 1), *_MLP)

    def branch(self, x: Tensor) -> Any:
        _, best = torch.topk(self.score(x).squeeze(-1), 2, dim=-1)
        kept = torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, WIDTH))
        return self.fc2(F.relu(self.fc1(x))) + kept.mean(1, keepdim=True)


BLOCKS: dict[str, tuple[Callable[[], Block], str]] = {
    "parallel": (Parallel, QKVO + MLP + HEAD),
    "latent": (Latent, LATENT + HEAD),
    "narrowed": (Narrowed, NARROWED + HEAD),
    "glu": (GLU, "gate_up gate up reader 8 24\ndown down writer 12 8\n" + HEAD),
    "squared-relu": (SquaredReLU, MLP + HEAD),
    "gated-recurrence": (GatedRecurrence, "gate reader 8 12\nstate reader 8 12\nout writer 12 8\n" + HEAD),
    "relative-positions": (RelativePositions, QKVO + "position inner 8 8\n" + HEAD),
    "routed": (Routed, "router router reader 8 3\n" + HEAD),
    "chosen-rows": (ChosenByFirst, "scores reader 8 3\nout writer 8 8\n" + HEAD),
    "top-tokens": (TopTokens, "score reader 8 1\n" + MLP + HEAD),
}


@both_captures
@pytest.mark.parametrize("name", broad_after(5, BLOCKS))
def test_block_has_the_roles_of_its_table(name: str, exported: bool) -> None:
    build, golden = BLOCKS[name]
    inputs = (torch.randn(2, 3, WIDTH),) if exported else None
    check_table(llfx.inspect(build(), inputs), golden)


def test_keys_written_in_place_have_their_role() -> None:
    """Test the exported graph only, because symbolic tracing records no assignment to a slice."""
    golden = QKVO + "k2 key reader 8 8\n" + HEAD
    check_table(llfx.inspect(Written(), (torch.randn(2, 3, WIDTH),)), golden)


@both_captures
def test_a_linear_whose_choice_is_returned_is_not_a_router(exported: bool) -> None:
    table = llfx.inspect(TopClasses(), (torch.randn(2, 3, WIDTH),) if exported else None)
    assert all("router" not in row.roles for row in table)
