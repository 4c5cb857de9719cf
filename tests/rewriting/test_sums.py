"""Sums of adapters against sums of dense weights, and against what PEFT makes of the same adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant
from tests.adapters.test_switches import fill
from tests.support.captured import captured
from tests.support.models import GatedMLP, ResidualMLP, double_net, ids, net
from tests.support.selection import broad_after

EVERYWHERE: Any = {"target_names": (".",)}
LOW_RANK: list[Callable[[int], Variant]] = [
    lambda r: llfx.LoRA(r=r, **EVERYWHERE),
    lambda r: llfx.PiSSA(r=r, **EVERYWHERE),
    lambda r: llfx.OLoRA(r=r, **EVERYWHERE),
    lambda r: llfx.AdaLoRA(r=r, **EVERYWHERE),
    lambda r: llfx.DeLoRA(r=r, **EVERYWHERE),
    lambda r: llfx.HRA(r=2 * r, **EVERYWHERE),
]
ANY: list[Callable[[int], Variant]] = [
    *LOW_RANK,
    lambda r: llfx.DoRA(r=r, **EVERYWHERE),
    lambda r: llfx.IA3(**EVERYWHERE),
]


def weights(model: nn.Module) -> dict[str, Tensor]:
    merged: nn.Module = llfx.merge(model)
    return {name: tensor.detach() for name, tensor in merged.named_parameters() if tensor.dim() == 2}


def changes(gm: Any, name: str, base: nn.Module) -> dict[str, Tensor]:
    with llfx.active(gm, name):
        merged = weights(gm)
    found = {key: merged[key] - base.get_parameter(key).detach() for key in merged}
    return {key: change for key, change in found.items() if change.any()}


def without_biases() -> nn.Module:
    return double_net(GatedMLP, ResidualMLP, bias=False)  # IA3 changes biases too


def two(first: Variant, second: Variant) -> tuple[Any, nn.Module]:
    model, graph = captured(without_biases, inputs=(ids(2, 5),))
    gm = llfx.rewrite(graph, {"one": first, "two": second})
    fill(gm)
    return gm, model


@pytest.mark.broad
@settings(max_examples=5, deadline=None)
@given(
    first=st.sampled_from(ANY),
    second=st.sampled_from(ANY),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    factors=st.tuples(st.sampled_from([-1.0, 0.3, 1.0]), st.sampled_from([-0.5, 0.7])),
)
def test_a_linear_sum_is_the_sum_of_the_changes(first: Any, second: Any, ranks: Any, factors: Any) -> None:
    gm, base = two(first(ranks[0]), second(ranks[1]))
    before = gm(ids(3, 4))
    errors = llfx.combine(gm, {"one": factors[0], "two": factors[1]}, "sum")
    torch.testing.assert_close(gm(ids(3, 4)), before)  # it does not act yet
    assert set(errors.values()) == {0.0}
    one, other, summed = (changes(gm, name, base) for name in ("one", "two", "sum"))
    for key, change in summed.items():
        torch.testing.assert_close(change, factors[0] * one[key] + factors[1] * other[key], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("make", broad_after(1, ANY))
def test_any_adapter_is_a_lora_exactly_or_by_the_error_that_is_told(make: Callable[[int], Variant]) -> None:
    gm, base = two(make(2), llfx.LoRA(r=1, **EVERYWHERE))
    lora, errors = llfx.to_lora(gm, adapter="one")
    with llfx.active(gm, "one"):
        torch.testing.assert_close(lora(ids(3, 4)), gm(ids(3, 4)))
        everything, _ = llfx.to_lora(gm)
        torch.testing.assert_close(everything(ids(3, 4)), gm(ids(3, 4)))
    assert set(errors.values()) == {0.0}
    assert {row.variant for row in llfx.adapters(lora)} == {"LoRA"}
    rough, errors = llfx.to_lora(gm, 1, adapter="one")
    exact = changes(gm, "one", base)
    found = changes(rough, "default", base)
    for site, error in errors.items():
        change = exact[f"{site}.weight"]
        off = torch.linalg.vector_norm(found[f"{site}.weight"] - change) / torch.linalg.vector_norm(change)
        torch.testing.assert_close(float(off), error, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("make", broad_after(2, LOW_RANK))
def test_what_has_a_low_rank_by_construction_keeps_it(make: Callable[[int], Variant]) -> None:
    model = nn.Sequential(nn.Linear(24, 32)).double()
    gm = llfx.rewrite(model, make(2), (torch.randn(2, 24).double(),))
    fill(gm)
    lora, _ = llfx.to_lora(gm)
    config: Any = llfx.adapters(lora)[0].config
    assert config.r <= 4


@pytest.mark.broad
def test_adapters_that_act_together_and_are_scaled_become_one_lora() -> None:
    gm, _ = two(llfx.DoRA(r=2, **EVERYWHERE), llfx.HRA(r=2, **EVERYWHERE))
    with llfx.scaled(gm, {"one": 0.5, "two": -1}):
        lora, _ = llfx.to_lora(gm)
        torch.testing.assert_close(lora(ids(3, 4)), gm(ids(3, 4)))


@pytest.mark.parametrize("method", broad_after(1, ["dare_ties", "ties"]))
def test_merging_methods_equal_those_of_peft(method: Any) -> None:
    from peft.utils.merge_utils import dare_ties, ties

    gm, base = two(llfx.LoRA(r=2, **EVERYWHERE), llfx.LoRA(r=3, **EVERYWHERE))
    density = 0.5 if method == "ties" else 1.0  # with 1, nothing is drawn
    llfx.combine(gm, {"one": 0.7, "two": 0.4}, "sum", method=method, r=64, density=density)
    one, other, summed = (changes(gm, name, base) for name in ("one", "two", "sum"))
    theirs = {"ties": ties, "dare_ties": dare_ties}[method]
    for key, change in summed.items():
        expected = theirs([one[key], other[key]], torch.tensor([0.7, 0.4], dtype=torch.float64), density)
        torch.testing.assert_close(change, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.broad
def test_dare_keeps_the_change_in_the_mean_and_depends_on_its_seed() -> None:
    gm, base = two(llfx.LoRA(r=2, **EVERYWHERE), llfx.LoRA(r=3, **EVERYWHERE))
    llfx.combine(gm, {"one": 1}, "all", method="dare", r=64, density=1.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        llfx.combine(gm, {"one": 1}, name, method="dare", r=64, density=0.5, seed=seed)
    one, everything, a, b, c = (changes(gm, name, base) for name in ("one", "all", "a", "b", "c"))
    for key, change in one.items():
        torch.testing.assert_close(everything[key], change, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(a[key], b[key], atol=1e-7, rtol=1e-5)
        assert not torch.allclose(a[key], c[key])
        kept = a[key].abs() > 1e-6
        torch.testing.assert_close(a[key][kept], 2 * change[kept], atol=1e-6, rtol=1e-4)


@pytest.mark.broad
def test_an_adapted_model_gets_a_sum_too(tmp_path: Any) -> None:
    from transformers import LlamaForCausalLM

    from tests.support.models import tiny_llama

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny_llama()).eval()
    adapted: Any = llfx.adapt(model, {"fr": llfx.LoRA(r=2), "de": llfx.DoRA(r=2)})
    fill(adapted)
    llfx.combine(adapted, {"fr": 0.5, "de": 0.5}, "mix")
    prompt = torch.randint(1, 20, (2, 4))
    with llfx.active(adapted, "mix"):
        expected = adapted(prompt).logits
    llfx.save_peft(adapted, tmp_path / "mix", adapter="mix")
    torch.testing.assert_close(llfx.load_peft(model, tmp_path / "mix")(prompt).logits, expected)


def test_save_peft_writes_any_change_of_low_rank_as_lora(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 24, bias=False)).double()
    x = torch.randn(2, 24).double()
    gm = llfx.rewrite(model, llfx.HRA(r=2, **EVERYWHERE), (x,))
    fill(gm)
    llfx.save_peft(gm, tmp_path, as_lora=True)
    loaded = llfx.load_peft(model, tmp_path, (x,))
    assert {row.variant for row in llfx.adapters(loaded)} == {"LoRA"}
    torch.testing.assert_close(loaded(x), gm(x))
    full = llfx.rewrite(model, llfx.IA3(**EVERYWHERE), (x,))
    fill(full)
    with pytest.raises(llfx.ConfigError, match=r"an approximation, lora, errors = llfx\.to_lora"):
        llfx.save_peft(full, tmp_path, as_lora=True)


@pytest.mark.parametrize(
    ("call", "message"),
    broad_after(
        4,
        [
            (lambda gm: llfx.combine(gm, {"it": 1}, "sum"), "no adapter 'it'"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "two"), "an adapter 'two' already"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "a.b"), "of letters, digits and underscores"),
            (lambda gm: llfx.combine(gm, {"one": float("nan")}, "sum"), "a finite number"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "sum", method=cast(Any, "mean")), "the methods are linear"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "sum", method="ties"), "takes the rank to keep"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "sum", method="ties", r=2, density=0), "density"),
            (lambda gm: llfx.combine(gm, {"one": 1}, "sum", r=0), "a positive integer"),
            (lambda gm: llfx.combine(gm, {"one": 0}, "sum"), "No adapter acts"),
            (lambda gm: llfx.to_lora(gm, adapter="it"), "no adapter 'it'"),
            (lambda gm: llfx.to_lora(gm, -1), "a positive integer"),
            (lambda gm: llfx.to_lora(llfx.remove(gm)), "has no adapters"),
        ],
        several=True,
    ),
)
def test_bad_sums_are_refused_and_change_nothing(call: Callable[[Any], Any], message: str) -> None:
    gm, _ = two(llfx.LoRA(r=2, **EVERYWHERE), llfx.LoRA(r=3, **EVERYWHERE))
    before = str(llfx.adapters(gm)), str(gm.graph)
    with pytest.raises(llfx.AdapterError, match=message):
        call(gm)
    assert (str(llfx.adapters(gm)), str(gm.graph)) == before


@pytest.mark.broad
def test_adapters_that_are_all_off_are_no_lora_and_leave_a_room_empty() -> None:
    gm, base = two(llfx.LoRA(r=2, **EVERYWHERE), llfx.LoRA(r=3, **EVERYWHERE))
    room = llfx.rewrite(base, llfx.LoRA(r=8, **EVERYWHERE), (ids(2, 5),))
    fill(room)
    with llfx.active(gm, []):
        with pytest.raises(llfx.AdapterError, match="No adapter acts"):
            llfx.to_lora(gm)
        llfx.swap(room, gm)
    torch.testing.assert_close(room(ids(3, 4)), base(ids(3, 4)))


def test_changes_that_are_not_of_the_weight_are_refused() -> None:
    gm, _ = two(llfx.LoRA(r=2, bias=True, **EVERYWHERE), llfx.LoRA(r=3, **EVERYWHERE))
    with pytest.raises(llfx.AdapterError, match="changes the bias too"):
        llfx.combine(gm, {"one": 1, "two": 1}, "sum")
    model = net(GatedMLP).double()
    wrapped = llfx.wrap(model, llfx.LoRA(r=2, **EVERYWHERE), (ids(2, 5),))
    with pytest.raises(llfx.AdapterError, match="rewrite or adapt in place of wrap"):
        llfx.to_lora(wrapped)
