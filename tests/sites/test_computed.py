"""Weights and biases that a model computes, and weights in `einsum`: they equal the wrapper and can be merged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from lora_lite_fx.sites.kinds.contraction import Contraction, contraction
from tests.support.conformance import (
    check_export,
    check_file,
    check_remove,
    check_rewrite_equals_wrap,
    close,
    output,
    randomise,
    small,
    unchanged,
)
from tests.support.selection import broad_after, broad_unless

D = 8
X, Y = (
    torch.randn(*shape, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for shape in ((2, 5), (3, 4))
)


class JoinedBias(nn.Module):
    """A linear whose bias is put together from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, D))
        self.first, self.last = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat((self.first, torch.zeros_like(self.last), self.last)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, D)), nn.Parameter(torch.rand(6, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


class BufferBias(nn.Module):
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, D))
        self.register_buffer("bias", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,io->bso", x, self.weight)


class HeadsOut(nn.Module):
    """A projection to heads, as XLNet's queries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,inh->bsnh", x, self.weight)


class HeadsIn(nn.Module):
    """A projection from heads, as XLNet's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("onh,bsnh->bso", self.weight, x)


class Gain(nn.Module):
    """A parametrization of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6, 1) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


def parametrized() -> nn.Module:
    linear = nn.Linear(D, 6)
    return parametrize.register_parametrization(linear, "weight", Gain())


def normed_by_hook() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(D, 6))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "joined bias": JoinedBias,
    "bias is a buffer": BufferBias,
    "scaled weight": Scaled,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(D, 6)),
    "weight_norm of a hook": normed_by_hook,
    "parametrized": parametrized,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, 6)),
    "einsum": Einsum,
    "einsum to heads": HeadsOut,
    "einsum from heads": HeadsIn,
}
OPAQUE_WHEN_SYMBOLIC = {"orthogonal"}
COMPUTED = [name for name in MODULES if "einsum" not in name]


class Net(nn.Module):
    """The module `mid` between others, so that neither its input nor its output is the model's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enter = nn.Linear(D, D)
        self.mid = MODULES[name]()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        y: Tensor = self.mid(h.unflatten(-1, (2, 4)) if self.name == "einsum from heads" else h)
        return torch.tanh(y.flatten(2))


@functools.cache
def model_and_base(name: str, exported: bool) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = Net(name).double().eval()
    return model, llfx.capture(model, (X,) if exported else None)


VARIANTS = [llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.HRA]
CASES = [(name, True, cls) for name in MODULES for cls in VARIANTS]
CASES += [(name, False, llfx.DoRA) for name in MODULES if name not in OPAQUE_WHEN_SYMBOLIC]


@pytest.mark.parametrize(
    ("name", "exported", "cls"), broad_unless(lambda case: case[1] and case[2] is llfx.LoRA, CASES, several=True)
)
def test_adapters_there_equal_the_wrapper_and_can_be_merged_removed_and_saved(
    name: str, exported: bool, cls: type[llfx.Variant]
) -> None:
    model, base = model_and_base(name, exported)
    cfg = small(cls, 2, target_names=("mid",))
    with unchanged(model):
        gm, wrapped = llfx.rewrite(base, cfg), llfx.wrap(base, cfg)
        assert {name.rpartition(".")[0] for name in llfx.adapter_state_dict(gm)} == {"mid"}
        check_rewrite_equals_wrap(model, gm, wrapped, (Y,), 1e-10, 0)
        merged = llfx.merge(gm)
        close(output(merged.eval(), (Y,)), output(gm.eval(), (Y,)), 1e-9, "merged")
        check_remove(gm, base, model)
        check_file(gm, base, (Y,))
        if exported and cls is llfx.DoRA and name in ("joined bias", "weight_norm", "einsum to heads"):
            check_export(gm, (X,), (Y,), 1e-10)
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("name", broad_after(2, COMPUTED))
def test_merging_puts_a_tensor_in_the_place_of_what_the_adapters_change(name: str) -> None:
    _, base = model_and_base(name, True)
    gm = llfx.rewrite(base, llfx.IA3(target_names=("mid",)))
    randomise(gm, 0)
    merged = llfx.merge(gm)
    site = next(site for site in find_sites(merged) if site.name == "mid")
    assert site.computed_weight is None
    assert site.computed_bias is None
    leaves = {name.removeprefix("mid.") for name, _ in merged.named_parameters() if name.startswith("mid")}
    assert leaves <= {"weight", "bias"}, "what nothing reads any more is gone"


def test_merging_keeps_a_computed_bias_that_the_adapters_do_not_change() -> None:
    _, base = model_and_base("joined bias", True)
    gm = llfx.rewrite(base, llfx.LoRA(r=2, target_names=("mid",)))
    randomise(gm, 0)
    assert str(llfx.merge(gm).graph) == str(base.graph)


def test_a_computed_tensor_follows_its_parameters() -> None:
    """Write into a parameter of a weight norm, because an adapter must not read a copy of an older weight."""
    model = Net("weight_norm").double().eval()
    cfg = llfx.DoRA(r=2, target_names=("mid",))
    gm, wrapped = llfx.rewrite(model, cfg, (X,)), llfx.wrap(model, cfg, (X,))
    for adapted in (gm, wrapped):
        randomise(adapted, 0)
    before = output(gm.eval(), (Y,))
    with torch.no_grad():
        model.get_parameter("mid.parametrizations.weight.original0").mul_(1.5)
    close(output(gm.eval(), (Y,)), output(wrapped.eval(), (Y,)), 1e-10, "after the write")
    assert (output(gm, (Y,)) - before).abs().max() > 0.01


class Twice(nn.Module):
    """One weight in two forms, one of which is computed, and one module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.rand(D))
        self.normed = parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.normed(torch.tanh(self.normed(x))))
        return torch.tanh(F.linear(h, self.weight)) + F.linear(h, self.weight * self.scale)


@pytest.mark.broad
def test_two_forms_of_a_weight_are_two_sites_and_two_calls_of_a_module_are_one() -> None:
    model = Twice().double().eval()
    base = llfx.capture(model, (X,))
    sites = {site.name: len(site.calls) for site in find_sites(base)}
    assert sites == {"normed": 2, "sites.weight": 1, "sites.weight.use_2": 1}
    gm = llfx.rewrite(base, [llfx.DoRA(r=2, target_names=(".",)), llfx.IA3(target_names=(".",))])
    randomise(gm, 0)
    close(output(llfx.merge(gm).eval(), (Y,)), output(gm.eval(), (Y,)), 1e-9, "merged")
    check_remove(gm, base, model)
    check_file(gm, base, (Y,))


# Attention.


class JoinedAttention(nn.Module):
    """The attention of BEiT, EVA02 and SwinV2: one weight for q, k and v, and a bias without a part for k."""

    k_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.register_buffer("k_bias", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = (qkv[..., i * D : (i + 1) * D].unflatten(-1, (2, -1)).transpose(1, 2) for i in range(3))
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + y


class SeparateAttention(nn.Module):
    """The attention of WavLM: PyTorch's function on weights of its own, with their biases joined for it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            D,
            2,
            torch.empty([0]),
            torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)),
            None,
            None,
            False,
            0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )
        return (x + y).transpose(0, 1)


ATTENTIONS: dict[str, tuple[type[nn.Module], dict[str, set[str]]]] = {
    "joined": (JoinedAttention, {"qkv": {"query", "key", "value"}, "proj": {"output"}}),
    "separate": (
        SeparateAttention,
        {"q_proj": {"query"}, "k_proj": {"key"}, "v_proj": {"value"}, "out_proj": {"output"}},
    ),
}


@pytest.mark.broad
@pytest.mark.parametrize("exported", broad_after(1, [True, False]))
@pytest.mark.parametrize("name", broad_after(1, ATTENTIONS))
def test_projections_with_computed_biases_are_sites_with_roles(name: str, exported: bool) -> None:
    kind, roles = ATTENTIONS[name]
    torch.manual_seed(0)
    model = kind().double().eval()
    base = llfx.capture(model, (X,) if exported else None)
    close(output(base, (Y,)), output(model, (Y,)).detach(), 1e-12, "graph")
    table = llfx.inspect(base)
    assert {row.name: set(row.roles) - {"reader", "writer", "inner"} for row in table} == roles
    assert all(row.bias for row in table)
    assert not table.left_out
    for cfg in (llfx.LoRA(r=2), llfx.DoRA(r=2), llfx.IA3(target_roles=("attention",)), llfx.HRA(r=2)):
        gm = llfx.rewrite(base, cfg)
        randomise(gm, 0)
        merged = llfx.merge(gm)
        close(output(merged.eval(), (Y,)), output(gm.eval(), (Y,)), 1e-9, "merged")
        dense = kind().double().eval()  # the same values in the model itself
        dense.load_state_dict(
            {key: value for key, value in merged.state_dict().items() if key in dense.state_dict()}, False
        )
        if isinstance(cfg, (llfx.LoRA, llfx.HRA)):  # the others change the biases
            dense.load_state_dict(merged.state_dict(), strict=True)
            close(output(dense, (Y,)).detach(), output(gm, (Y,)), 1e-9, "dense")
        check_remove(gm, base, model)
        check_file(gm, base, (Y,))


def test_wrap_and_peft_refuse_weights_that_are_read_without_calling_their_module() -> None:
    model = JoinedAttention().double()
    cfg = llfx.LoRA(r=2, target_names=("qkv",))
    with pytest.raises(llfx.ConfigError, match="'qkv' is not a module that is called"):
        llfx.wrap(model, cfg, (X,))
    with pytest.raises(llfx.ConfigError, match="reads the weight of 'qkv' without calling that module"):
        llfx.to_peft_config(llfx.rewrite(model, cfg, (X,)))


class DoesMore(nn.Module):
    """A module with a weight of its own that does more than multiply with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(F.linear(x, self.weight), dim=-1)


@pytest.mark.parametrize("exported", [True, False])
def test_wrap_refuses_a_module_that_does_more_than_its_product(exported: bool) -> None:
    model = nn.Sequential(DoesMore(), nn.Linear(D, D)).double()
    with pytest.raises(llfx.ConfigError, match="'0' is not a module that is called and does nothing else"):
        llfx.wrap(model, llfx.LoRA(r=2, target_names=("0",)), (X,) if exported else None)


# Equations.


def test_equations_that_are_linears_over_the_last_dimensions() -> None:
    kind = contraction("b s d, d h k -> b s h k", False, (8, 2, 4))
    assert isinstance(kind, Contraction)
    assert (kind.inputs, kind.outputs) == ((8,), (2, 4))
    weight = torch.randn(8, 2, 4)
    x = torch.randn(3, 8)
    close(x @ kind.matrix(weight).mT, torch.einsum("bd,dhk->bhk", x, weight).flatten(1), 1e-6, "matrix")
    assert torch.equal(kind.stored(kind.matrix(weight), weight), weight)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bhd,hde->bhe", "an index is in input, weight and output"),
        ("bds,de->bes", "is not over the last dimensions"),
        ("bd,de", "not of two operands and an output"),
        ("bdd,de->be", "repeats an index"),
    ],
)
def test_equations_that_are_not_linears_say_why(equation: str, reason: str) -> None:
    weight = equation.split(",")[1].split("->")[0]
    assert reason in str(contraction(equation, False, (4,) * len(weight)))


@pytest.mark.parametrize("cls", [llfx.EVA])
def test_inputs_of_several_dimensions_cannot_be_observed(cls: Any) -> None:
    _, base = model_and_base("einsum from heads", True)
    with pytest.raises(llfx.ConfigError, match="'mid' is a linear over several dimensions"):
        llfx.rewrite(base, cls(r=2, target_names=("mid",)), calibration=[(X,)])
