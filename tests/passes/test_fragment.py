"""Traces of a variant's `forward`: what they depend on, and what one graph cannot follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.dependencies import Dependencies
from lora_lite_fx.passes.adaptation import fragment
from lora_lite_fx.sites.site import Site
from tests.support.conformance import close, for_any_linear, gradients, randomise, rewrite_and_wrap, small
from tests.support.own_variants import registered
from tests.support.selection import broad_after

WIDTH = 8


class Deep(nn.Module):
    """Four linears of one shape, which differ in name, layer and roles alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


@dataclass(frozen=True, kw_only=True)
class ReadsSite(llfx.Variant):
    """Adds a vector times a number that depends on a value of the site."""

    field: str = "name"

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        return {"lora_d": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y: Tensor = base(x) + sum(str(getattr(base.site, self.field)).encode()) % 97 * p.lora_d
        return y


@dataclass(frozen=True, kw_only=True)
class OtherSizes(llfx.Variant):
    """Asks for another rank in each layer, and computes with the rank as a number."""

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        r = 1 + int(site.name.rpartition(".")[2]) % 3
        return {"lora_A": llfx.ParamSpec((r, site.d_in)), "lora_B": llfx.ParamSpec((site.d_out, r))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y: Tensor = base(x) + F.linear(F.linear(x, p.lora_A), p.lora_B) / len(p.lora_A)
        return y


@dataclass(frozen=True, kw_only=True)
class Noisy(llfx.Variant):
    """Draws noise in training, in the way that `form` says."""

    form: str = "if"

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        return {"lora_s": llfx.ParamSpec((site.d_in,))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        if self.form == "factor":
            return base(x + base.training * p.lora_s * torch.randn_like(x))
        if self.form == "dropout":
            return base(x + p.lora_s * F.dropout(torch.ones_like(x), 0.5, base.training))
        if base.training:
            x = x + p.lora_s * torch.randn_like(x)
        return base(x)


@dataclass(frozen=True, kw_only=True)
class Gated(llfx.Variant):
    """Scales the output by a vector, which is wider than it under autocast; and drops some of it in training."""

    drops: bool = False

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,), init="ones")}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y: Tensor = base(x) * p.lora_g
        return F.dropout(y, 0.5, base.training) if self.drops else y


@dataclass(frozen=True, kw_only=True)
class ByHead(llfx.Variant):
    """Turns each head by a matrix, in a `form` that takes the output apart in one way or another."""

    form: str = "unflatten"

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        return {"lora_R": llfx.ParamSpec((2, site.d_out // 2, site.d_out // 2))}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        if self.form == "unflatten":
            return torch.einsum("...hi,hij->...hj", y.unflatten(-1, (2, -1)), p.lora_R).flatten(-2)
        if self.form == "shape":
            turned: Tensor = y.view(y.shape[0], y.shape[1], 2, 1, -1) @ p.lora_R
            return turned.view(y.shape[0], y.shape[1], -1)
        if self.form == "dim":
            return torch.add(y, p.lora_R.sum(), alpha=1 if y.dim() == 3 else -1)
        batch, length, _ = y.shape
        return torch.einsum("bshi,hij->bshj", y.view(batch, length, 2, -1), p.lora_R).reshape(batch, length, -1)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with registered(ByHead, Noisy, OtherSizes, ReadsSite):
        yield


X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deep() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Deep()
    return model, llfx.capture(model, (X,))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sites at which `forward` is traced."""
    names: list[str] = []
    trace = fragment.trace_fragment

    def noting(gm: Any, site: Site, *rest: Any) -> Any:
        names.append(site.name)
        return trace(gm, site, *rest)

    monkeypatch.setattr(fragment, "trace_fragment", noting)
    return names


def _same_as_wrap(graph: Any, cfg: llfx.Variant, x: Tensor) -> None:
    gm, wrapped = rewrite_and_wrap(graph, cfg)
    for adapted in (gm, wrapped):
        randomise(adapted, 1)
    for training in (True, False):
        (y, grads), (expected, own) = (gradients(model.train(training), (x,)) for model in (gm, wrapped))
        close(y, expected, 1e-5, f"training={training}")
        assert grads.keys() == own.keys()
        for name, grad in grads.items():
            close(grad, own[name], 1e-5, name)


# What a trace depends on.


@pytest.mark.parametrize(
    ("field", "traces"),
    broad_after(
        4,
        [
            ("name", 4),
            ("layer", 4),
            ("weight", 4),
            ("bias", 4),
            ("roles", 1),
            ("kind", 1),
            ("d_in", 1),
            ("transposed", 1),
        ],
        several=True,
    ),
)
def test_sites_share_a_trace_where_what_it_read_is_equal(
    field: str, traces: int, deep: tuple[nn.Module, Any], traced: list[str]
) -> None:
    _same_as_wrap(deep[1], ReadsSite(field=field, target_names="layers"), torch.randn(4, 2, WIDTH))
    assert len(traced) == traces


def test_sites_share_a_trace_where_params_asks_for_equal_tensors(
    deep: tuple[nn.Module, Any], traced: list[str]
) -> None:
    _same_as_wrap(deep[1], OtherSizes(target_names="layers"), torch.randn(4, 2, WIDTH))
    assert traced == ["layers.0", "layers.1", "layers.2"]


def test_our_own_variants_are_traced_once_for_sites_of_one_shape(
    deep: tuple[nn.Module, Any], traced: list[str]
) -> None:
    for cfg in (llfx.LoRA(r=2, target_names="layers"), llfx.LoHa(r=2, target_names="layers")):
        traced.clear()
        llfx.rewrite(deep[1], cfg)
        assert traced == ["layers.0"]


def test_reads_are_values_and_what_reads_all_notes_all() -> None:
    site = Site("layers.3.q", 4, 6, frozenset({"query"}))
    frozen = llfx.FrozenLinear(lambda x: x, torch.zeros(6, 4), None, site)
    dependencies = Dependencies()
    watched = dependencies.watch(frozen)
    assert dependencies.site == {}
    assert not dependencies.training
    assert watched.site.layer == 3
    assert "query" in watched.site.roles
    assert dependencies.site == {"layer": 3, "roles": frozenset({"query"})}
    assert dependencies.hold_at(Site("other.3.k", 1, 1, frozenset({"query"})))
    assert not dependencies.hold_at(Site("other.4.k", 1, 1, frozenset({"query"})))
    assert not watched.training
    assert dependencies.training
    assert isinstance(watched.site, Site)
    for reading_all in (vars, repr, hash, lambda site: site.own_bias(None)):
        dependencies.site.clear()
        reading_all(watched.site)
        assert dependencies.site["name"] == "layers.3.q"
    assert watched.site == site


# What one graph cannot follow.


def test_noise_under_an_if_is_refused_with_a_form_that_works(deep: tuple[nn.Module, Any]) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        llfx.rewrite(deep[1], Noisy(target_names="layers.1"))
    assert str(caught.value) == (
        "Noisy.forward at 'layers.1' runs other operations in training than in evaluation, from aten.randn_like.default"
        " on, and one graph cannot follow both. The way out: run the same in both modes, with base.training as a"
        " factor, x + base.training * noise in place of `if base.training: x = x + noise`; or F.dropout(x, rate,"
        " base.training)."
    )


@pytest.mark.parametrize("form", broad_after(1, ["factor", "dropout"]))
def test_noise_in_the_form_of_the_message_is_that_of_wrap(form: str, deep: tuple[nn.Module, Any]) -> None:
    cfg = Noisy(form=form, target_names="layers")
    _same_as_wrap(deep[1], cfg, torch.randn(4, 2, WIDTH))
    gm = llfx.rewrite(deep[1], cfg)
    randomise(gm, 1)
    trained, again = (gm.train()(X) for _ in range(2))
    assert not torch.equal(trained, again), "there is noise"
    torch.testing.assert_close(llfx.merge(gm).eval()(X), gm.eval()(X).detach())


@pytest.mark.parametrize("drops", [False, True])
def test_the_output_keeps_the_type_of_the_frozen_one_under_autocast(drops: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    for adapted in rewrite_and_wrap(llfx.capture(model, (X,)), Gated(drops=drops, target_names="0")):
        for training in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                assert adapted.train(training)(X).dtype is torch.bfloat16


SHAPES = ((WIDTH,), (3, WIDTH), (2, 3, WIDTH), (2, 1, 3, WIDTH))


@pytest.mark.parametrize("form", broad_after(1, ["shape", "dim", "unpacked"]))
def test_a_forward_for_one_number_of_dimensions_is_refused_without_example_inputs(form: str) -> None:
    model = Deep()
    cfg = ByHead(form=form, target_names="layers.1")
    with pytest.raises(llfx.ConfigError) as caught:
        llfx.rewrite(model, cfg)
    assert str(caught.value) == (
        "ByHead.forward at 'layers.1' depends on how many dimensions its input has, and a graph that was captured"
        " without example inputs does not know. The way out: pass example_inputs; or count dimensions from the last, as"
        " x.shape[-1], x.unflatten(-1, (heads, -1)) and y.flatten(-2)."
    )
    _same_as_wrap(llfx.capture(model, (X,)), cfg, torch.randn(4, 2, WIDTH))  # the first way out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_forward_for_any_number_of_dimensions_needs_none(shape: tuple[int, ...]) -> None:
    model = Deep()
    _same_as_wrap(llfx.capture(model), ByHead(target_names="layers"), torch.randn(shape))


def test_all_sites_of_a_graph_that_knows_its_dimensions_are_right_in_any() -> None:
    model = Deep()
    for shape in SHAPES[1:3]:
        graph = llfx.capture(model, (torch.randn(shape),))
        _same_as_wrap(graph, ByHead(form="dim", target_names="layers"), torch.randn(shape).flip(0))


@pytest.mark.slow
def test_every_variant_of_ours_needs_no_example_inputs() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 12))
    for cls in for_any_linear().values():
        if cls.__module__.startswith("lora_lite_fx.") and cls is not llfx.EVA:
            llfx.rewrite(model, small(cls, target_names=("0",)))
