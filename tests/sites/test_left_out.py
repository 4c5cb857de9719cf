"""Weights that multiply data and are not sites are listed with the reason; what is no product of a weight is not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lora_lite_fx as llfx
from tests.support.selection import broad_after

D = 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


class Left(nn.Module):
    """A block with a linear and one weight that is not a site."""

    mid: Any

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.mid = self.make()

    def make(self) -> nn.Module:
        return nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x) + self.multiply(x)
        return y

    def multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FromLeft(Left):
    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = (self.mid.weight @ x.transpose(1, 2)).transpose(1, 2)
        return y


class DataBias(Left):
    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mid.weight, x.sum((0, 1)))


class PerHead(Left):
    def make(self) -> nn.Module:
        return nn.ParameterList([torch.randn(2, 4, 4)])

    def multiply(self, x: Tensor) -> Tensor:
        return torch.einsum("bshd,hde->bshe", x.unflatten(-1, (2, 4)), self.mid[0]).flatten(2)


class Dropped(Left):
    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.mid.weight, 0.5, self.training))


class Recurrent(Left):
    def make(self) -> nn.Module:
        return nn.GRU(D, D, batch_first=True)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(x)[0]
        return y


class Transposed(Left):
    def make(self) -> nn.Module:
        return nn.ConvTranspose1d(D, D, 1)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(x.transpose(1, 2)).transpose(1, 2)
        return y


@fx.wrap
def opaque_attention(x: Tensor, weight: Tensor) -> Tensor:
    """A function that symbolic tracing does not look into, as torchvision's `shifted_window_attention`."""
    return F.linear(x, weight)


class Opaque(Left):
    def multiply(self, x: Tensor) -> Tensor:
        return opaque_attention(x, self.mid.weight)


class Orthogonal(Left):
    def make(self) -> nn.Module:
        linear: nn.Module = parametrizations.orthogonal(nn.Linear(D, D, bias=False))
        return linear

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(x)
        return y


class Encoder(Left):
    def make(self) -> nn.Module:
        return nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(x)
        return y


class WithBiasOfKeys(Left):
    def make(self) -> nn.Module:
        return nn.MultiheadAttention(D, 2, batch_first=True, add_bias_kv=True)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(x, x, x)[0]
        return y


class Complex(Left):
    def make(self) -> nn.Module:
        return nn.Linear(D // 2, D // 2, dtype=torch.complex64)

    def multiply(self, x: Tensor) -> Tensor:
        pairs: Tensor = self.mid(torch.view_as_complex(x.unflatten(-1, (D // 2, 2))))
        return torch.view_as_real(pairs).flatten(-2)


class MadeComplex(Left):
    def make(self) -> nn.Module:
        return nn.ParameterList([torch.randn(D // 2, D // 2, 2)])

    def multiply(self, x: Tensor) -> Tensor:
        pairs = F.linear(torch.view_as_complex(x.unflatten(-1, (D // 2, 2))), torch.view_as_complex(self.mid[0]))
        return torch.view_as_real(pairs).flatten(-2)


class ComplexConvolution(Left):
    def make(self) -> nn.Module:
        return nn.Conv1d(5, 5, 1, dtype=torch.complex64)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(torch.fft.fft(x)).real
        return y


ATTENTION_AND_MLP = {"query", "key", "value", "output", "gate", "up", "down"}
# The model, whether it is exported, the names listed, the kind, and words of the reason.
CASES: dict[str, tuple[type[Left], bool, set[str], str, str]] = {
    "weight @ x": (FromLeft, True, {"mid"}, "linear", "inputs in the last dimension but one"),
    "weight @ x, symbolic": (FromLeft, False, {"mid"}, "linear", "inputs in the last dimension but one"),
    "bias from data": (DataBias, True, {"mid"}, "linear", "its bias depends on the inputs"),
    "an einsum by head": (PerHead, True, {"mid.sites.0"}, "linear", "an index is in input, weight and output"),
    "a weight with dropout": (Dropped, True, {"mid"}, "linear", "depends on the mode|is random"),
    "a recurrent operator": (
        Recurrent,
        True,
        {"mid.sites.weight_ih_l0", "mid.sites.weight_hh_l0"},
        "linear",
        "inside one operation; gm.get_param",
    ),
    "a recurrent module": (
        Recurrent,
        False,
        {"mid.sites.weight_ih_l0", "mid.sites.weight_hh_l0"},
        "linear",
        "GRU is not a kind of site; gm.get_",
    ),
    "a transposed convolution": (Transposed, True, {"mid"}, "conv", "conv_transpose1d is not a kind of site"),
    "complex numbers": (Complex, True, {"mid"}, "linear", "its numbers are complex"),
    "complex numbers, symbolic": (Complex, False, {"mid"}, "linear", "its numbers are complex"),
    "pairs as complex numbers": (MadeComplex, True, {"mid.sites.0"}, "linear", "its numbers are complex"),
    "pairs as complex numbers, symbolic": (MadeComplex, False, {"mid.sites.0"}, "linear", "its numbers are complex"),
    "a complex convolution": (ComplexConvolution, True, {"mid"}, "conv", "its numbers are complex"),
    "an opaque function": (Opaque, False, {"mid"}, "linear", "opaque_attention is opaque to the capture"),
    "an opaque parametrization": (Orthogonal, False, {"mid"}, "linear", "does not look into the module"),
    "an encoder layer": (
        Encoder,
        False,
        {"mid.self_attn.in_proj", "mid.self_attn.out_proj", "mid.linear1", "mid.linear2"},
        "linear",
        "does not look into TransformerEncoderLayer; with example_inputs torch.export looks into it",
    ),
    "attention with a bias of the keys": (
        WithBiasOfKeys,
        False,
        {"mid.in_proj", "mid.out_proj", "mid.sites.bias_k", "mid.sites.bias_v"},
        "linear",
        "does not look into MultiheadAttention",
    ),
}


@functools.cache
def base_of(name: str) -> fx.GraphModule:
    kind, exported, *_ = CASES[name]
    torch.manual_seed(0)
    return llfx.capture(kind().eval(), (X,) if exported else None)


@pytest.mark.parametrize("name", broad_after(8, CASES))
def test_a_weight_that_is_not_a_site_is_listed_with_the_reason(name: str) -> None:
    _, _, names, kind, reason = CASES[name]
    table = llfx.inspect(base_of(name), kinds=("linear", "conv"))
    assert [row.name for row in table] == ["lin"]
    assert {row.name for row in table.left_out} == names
    assert {row.kind for row in table.left_out} == {kind}
    for row in table.left_out:
        assert any(words in row.reason for words in reason.split("|")), row.reason
        assert f"{row.name}: {row.reason}" in str(table)
        assert row.name in table.to_html()
    assert [row["name"] for row in table.to_dict()["left_out"]] == [row.name for row in table.left_out]


def test_weights_of_other_kinds_are_listed_when_these_kinds_are() -> None:
    assert not llfx.inspect(base_of("a transposed convolution")).left_out


def test_what_is_opaque_may_have_any_role() -> None:
    for name in ("an opaque function", "an encoder layer"):
        assert all(set(row.roles) == ATTENTION_AND_MLP for row in llfx.inspect(base_of(name)).left_out)
    assert not llfx.inspect(base_of("a recurrent module")).left_out[0].roles


class NoWeights(nn.Module):
    """Parameters of two and more dimensions that no linear multiplies: positions, scales, norms, queries."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, D)
        self.positions = nn.Parameter(torch.randn(5, D))
        self.scale = nn.Parameter(torch.randn(1, 1, D))
        self.norm = nn.LayerNorm((5, D))
        self.relative = nn.Embedding(9, D)
        self.rel_proj = nn.Linear(D, D)
        self.query = nn.Parameter(torch.randn(1, 3, D))
        self.lin = nn.Linear(D, D)
        self.register_buffer("rotation", torch.randn(D, D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions
        x = self.norm(x * self.scale) @ self.rotation
        keys = self.lin(x)
        # Relative positions: looked up, projected with a weight that multiplies data too, and multiplied with data.
        relative = self.lin(self.relative(torch.arange(9)))
        scores = keys @ relative.transpose(0, 1)
        constant = self.rel_proj(self.query)
        y: Tensor = scores.sum((1, 2)) + (constant @ x.transpose(1, 2)).sum((1, 2))
        return y


@pytest.mark.parametrize("exported", [True, False])
def test_positions_scales_norms_and_constants_are_not_listed(exported: bool) -> None:
    model = NoWeights().eval()
    table = llfx.inspect(model, (torch.arange(5).expand(2, 5),) if exported else None, kinds=("linear", "embedding"))
    assert {row.name for row in table} >= {"embed", "lin"}
    assert not table.left_out
    assert "not sites" not in str(table)
    assert "left_out" not in table.to_dict()


class Positions(nn.Module):
    """A table of three dimensions that is cut to the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin = nn.Parameter(torch.randn(1, 7, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x + self.table[:, : x.shape[1]])
        return y


@pytest.mark.parametrize("inputs", [None, (X,)])
def test_a_cut_table_of_positions_is_no_stack_of_experts(inputs: Any) -> None:
    table = llfx.inspect(Positions(), inputs)
    assert (table.unadapted, table.left_out) == ((), ())


def test_an_adapted_graph_lists_the_same() -> None:
    base = base_of("weight @ x")
    adapted: Any = llfx.rewrite(base, [llfx.DoRA(r=2, target_names=("lin",)), llfx.HRA(r=2, target_names=("lin",))])
    assert llfx.inspect(adapted).left_out == llfx.inspect(base).left_out
