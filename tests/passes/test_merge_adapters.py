"""`merge_adapters`: the adapters are folded into tensors of the graph's own, or refused if no weight computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.passes import MergeAdapters
from lora_lite_fx.passes.adaptation import affine_form
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import randomise
from tests.support.models import one_layer_llama
from tests.support.own_variants import Bottleneck, Computed, Gate, registered
from tests.support.programs import after
from tests.support.selection import broad_after

aten = torch.ops.aten
WAY_OUT = " The way out: keep the adapter; files, exports, torch.compile and generation take it like any other."


def test_the_graph_is_the_base_with_other_weights() -> None:
    model = Down()
    base = llfx.capture(model, EXAMPLE)
    gm = llfx.rewrite(base, [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))])
    randomise(gm, 1)
    merged, report = after(gm, MergeAdapters())
    assert report.edits == 2
    assert str(merged.graph) == str(base.graph)
    torch.testing.assert_close(merged(*EXAMPLE), gm(*EXAMPLE).detach(), rtol=1e-4, atol=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, gm.get_parameter(name)), "the model's own weights stay"


# Variants that are not affine.


@dataclass(frozen=True, kw_only=True)
class FactorsOfOurs(llfx.PiSSA):
    """A class of the user's own, derived from one that files of other libraries have."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        y: Tensor = super().forward(x, base, p) + p.lora_B.sum()
        return y


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with registered(Bottleneck, Computed, FactorsOfOurs, Gate):
        yield


D_IN, D_OUT = 40, 12


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Any]:
    """A model of one linear, and its graph for inputs of three dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh())
    return model, llfx.capture(model, (torch.randn(2, 3, D_IN),))


def test_a_gate_that_reads_its_input_is_refused_by_name(linear: tuple[nn.Module, Any]) -> None:
    gm = llfx.rewrite(linear[1], Gate(target_names="0"))
    with pytest.raises(llfx.AdapterError) as caught:
        llfx.merge(gm)
    message = str(caught.value)
    start, _, rest = message.partition(" by up to ")
    assert start == (
        "Gate at '0' cannot be merged, because it is not affine in its input: on random inputs, what it computes"
        " differs from the weight and bias that would replace it"
    )
    number, _, way_out = rest.partition(" of the output.")
    assert way_out == WAY_OUT
    assert 0.5 < float(number) < 50
    gm(torch.randn(5, 1, D_IN))


def test_a_variant_that_says_so_is_refused_without_a_try(
    linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = llfx.rewrite(linear[1], Bottleneck(target_names="0"))
    monkeypatch.setattr("lora_lite_fx.passes.adaptation.affine_form.call_forward", None)  # which a try would call
    with pytest.raises(llfx.AdapterError) as caught:
        llfx.merge(gm)
    assert str(caught.value) == (
        f"Bottleneck at '0' cannot be merged, because it is not affine in its input (affine = False).{WAY_OUT}"
    )


Function = Callable[[Tensor, llfx.FrozenLinear, Any], Tensor]


def _one_coordinate(x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
    return base(torch.cat([x[..., :5], x[..., 5:6].clamp(-2, 2), x[..., 6:]], -1))


def _one_output(x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
    y = base(x)
    return torch.cat([y[..., :3].relu(), y[..., 3:]], -1)


NOT_AFFINE: dict[str, Function] = {
    "a sign": lambda x, base, p: base(x.abs()),
    "affine near zero": lambda x, base, p: base(x.clamp(-300, 300)),
    "affine far from zero": lambda x, base, p: base(torch.where(x.abs() < 1e-2, 0.0, x)),
    "affine in all coordinates but one": _one_coordinate,
    "affine in all outputs but one kind": _one_output,
    "rounded": lambda x, base, p: base((64 * x).round() / 64),
    "of the length": lambda x, base, p: base(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()),
    "the largest": lambda x, base, p: base(x) + F.linear(x, p.lora_A).amax(-1, keepdim=True),
    "a small gate": lambda x, base, p: base(x) * (1 + 1e-3 * F.linear(torch.tanh(F.linear(x, p.lora_A)), p.lora_B)),
    "only where all is positive": lambda x, base, p: base(x) * torch.where((x > 0).all(-1, keepdim=True), 2.0, 1.0),
    "of other tokens": lambda x, base, p: base(x - x.mean(-2, keepdim=True)),
    "of other rows": lambda x, base, p: base(x - x.mean(0, keepdim=True)),
    "of earlier tokens": lambda x, base, p: base(x.cumsum(-2)),
    "of the length of the text": lambda x, base, p: base(x) / x.shape[1],
    "noise": lambda x, base, p: base(x) + 0.01 * torch.randn_like(x[..., :1]),
}


@pytest.mark.parametrize("name", broad_after(5, NOT_AFFINE))
def test_what_no_weight_computes_is_refused(
    name: str, linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Computed.FUNCTIONS, name, NOT_AFFINE[name])
    gm = llfx.rewrite(linear[1], Computed(function=name, target_names="0"))
    with pytest.raises(llfx.AdapterError, match=r"^Computed at '0' cannot be merged, because it is not affine"):
        llfx.merge(gm)


def _three_dimensions(x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
    batch, length, _ = x.shape
    return base(x) + F.linear(x.view(batch * length, -1) @ p.lora_A.T, p.lora_B).view(batch, length, -1)


AFFINE: dict[str, Function] = {
    "in the rank of the graph": _three_dimensions,
    "large terms that cancel out": lambda x, base, p: base(x) + 1e3 * (base.weight.sum() * x[..., :1] - x[..., :1]),
    "nothing but the bias is left": lambda x, base, p: base(x * 0) + p.lora_B.sum(),
    "a guard against overflow in float16": lambda x, base, p: base(x.clamp(-65504, 65504)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_what_is_affine_merges(name: str, linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Computed.FUNCTIONS, name, AFFINE[name])
    gm = llfx.rewrite(linear[1], Computed(function=name, target_names="0"))
    x = torch.randn(4, 2, D_IN)
    torch.testing.assert_close(llfx.merge(gm)(x), gm(x).detach(), rtol=1e-4, atol=1e-4)


def test_rounding_is_told_from_what_is_not_affine(
    linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two branches are the same but for their rounding, which is as large as the output."""

    def cancels_out(x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x) + 1e6 * (F.linear(F.linear(x, p.lora_A), p.lora_B) - F.linear(x, p.lora_B @ p.lora_A))

    monkeypatch.setitem(Computed.FUNCTIONS, "cancels out", cancels_out)
    gm = llfx.rewrite(linear[1], Computed(function="cancels out", target_names="0"))
    merged = llfx.merge(gm)
    torch.testing.assert_close(merged.get_parameter("0.weight"), linear[0].get_parameter("0.weight").detach())


def test_a_forward_in_another_precision_is_refused(
    linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    half: Function = lambda x, base, p: base(x.bfloat16().float())  # noqa: E731
    monkeypatch.setitem(Computed.FUNCTIONS, "half", half)
    gm = llfx.rewrite(linear[1], Computed(function="half", target_names="0"))
    with pytest.raises(llfx.AdapterError, match=r"not affine in its input: .* by up to 0\.0\d+ of the output"):
        llfx.merge(gm)


def test_the_default_device_is_not_asked(linear: tuple[nn.Module, Any]) -> None:
    gm = llfx.rewrite(linear[1], llfx.LoRA(r=2, target_names="0"))
    affine_form._probes.cache_clear()
    with torch.device("meta"):
        llfx.merge(gm)


def test_trying_out_draws_no_random_numbers_of_the_user(linear: tuple[nn.Module, Any]) -> None:
    gm = llfx.rewrite(linear[1], llfx.LoRA(r=2, target_names="0"))
    torch.manual_seed(0)
    llfx.merge(gm)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_the_error_names_the_one_of_several_at_a_site(linear: tuple[nn.Module, Any]) -> None:
    both = [llfx.LoRA(r=2, target_names="0"), Gate(target_names="0"), llfx.IA3(target_names="0")]
    with pytest.raises(llfx.AdapterError, match=r"^Gate at '0' cannot be merged, because it is not affine"):
        llfx.merge(llfx.rewrite(linear[1], both))


def test_a_forward_that_fails_is_named(linear: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        if x.shape[-2] == D_IN:
            raise KeyError("width")
        return base(x) + F.linear(F.linear(x, p.lora_A), p.lora_B)

    monkeypatch.setitem(Computed.FUNCTIONS, "fails", fails)
    gm = llfx.rewrite(linear[1], Computed(function="fails", target_names="0"))
    with pytest.raises(llfx.AdapterError) as caught:
        llfx.merge(gm)
    assert str(caught.value) == (
        "Computed at '0' cannot be merged, because its forward fails on an input of shape (1, 40, 40) in evaluation:"
        " KeyError: 'width'"
    )


def test_values_that_are_not_finite_are_named_as_that(linear: tuple[nn.Module, Any]) -> None:
    gm = llfx.rewrite(linear[1], llfx.LoRA(r=2, target_names="0"))
    randomise(gm, 1)
    llfx.adapter_state_dict(gm)["0.lora_A"].fill_(torch.nan)
    with pytest.raises(llfx.AdapterError, match="values of the merged weight of '0' are NaN or infinite"):
        llfx.merge(gm)


def test_any_function_of_the_rows_of_an_embedding_merges() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Tanh())
    gm = llfx.rewrite(model, Gate(target_kinds="embedding"))
    ids = torch.arange(9).reshape(3, 3)
    torch.testing.assert_close(llfx.merge(gm)(ids), gm(ids).detach())
    with pytest.raises(llfx.AdapterError, match=r"affine = False"):
        llfx.merge(llfx.rewrite(model, Bottleneck(target_kinds="embedding")))


@pytest.mark.broad
def test_an_adapted_hugging_face_model_refuses_too_and_stays_as_it_is() -> None:
    adapted = llfx.adapt(one_layer_llama(), Gate(target_roles="gate"))
    ids = torch.arange(6).reshape(2, 3)
    before = adapted(ids).logits
    with pytest.raises(llfx.AdapterError, match=r"^Gate at 'model.layers.0.mlp.gate_proj' cannot be merged"):
        llfx.merge(adapted)
    assert torch.equal(adapted(ids).logits, before)


def test_a_class_of_the_users_own_is_not_written_as_its_parent(linear: tuple[nn.Module, Any], tmp_path: Any) -> None:
    gm = llfx.rewrite(linear[1], FactorsOfOurs(r=2, target_names="0"))
    with pytest.raises(llfx.ConfigError, match=r"^PEFT has no method that computes FactorsOfOurs\.$"):
        llfx.save_peft(gm, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
