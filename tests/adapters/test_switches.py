"""Switches: adapters act and are scaled as N separate eager wrappers say, in all forms in which a model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.adapters.variant import Variant
from tests.support.captured import captured
from tests.support.models import BLOCKS, GatedMLP, ResidualMLP, double_net, ids, net, tiny_llama
from tests.support.selection import broad_after, slow_unless

SPEC: dict[str, Any] = {
    "fr": llfx.LoRA(r=2, target_names=(".",)),
    "de": [llfx.HRA(r=2, target_names=(".",)), llfx.DoRA(r=2, target_names=(".",))],
}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give the adapters values that do something."""
    generator = torch.Generator().manual_seed(seed)
    state = llfx.adapter_state_dict(model)
    for name, tensor in sorted(state.items()):
        if tensor.is_floating_point() and "shared" not in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) * 0.2)


def same(one: nn.Module, other: nn.Module) -> None:
    """Give two models the same adapters."""
    llfx.load_adapter_state_dict(other, llfx.adapter_state_dict(one))


def grads(model: nn.Module) -> list[Tensor | None]:
    return [model.get_parameter(name).grad for name in sorted(llfx.adapter_state_dict(model))]


def pair(spec: Any, *blocks: type[nn.Module], example: Any = None) -> tuple[Any, Any, nn.Module]:
    model, graph = captured(double_net, *blocks, inputs=example)
    gm, wrapped = llfx.rewrite(graph, spec), llfx.wrap(graph, spec)
    fill(gm)
    same(gm, wrapped)
    return gm, wrapped, model


def seeded(model: nn.Module, *inputs: Tensor) -> Tensor:
    torch.manual_seed(0)
    output: Tensor = model(*inputs)
    return output


def assert_equal(gm: nn.Module, wrapped: nn.Module, *inputs: Tensor) -> None:
    """Compare outputs and the gradients of every parameter, in training, evaluation and a frozen scope."""
    for mode in (True, False):
        for model in (gm, wrapped):
            model.train(mode)
            model.zero_grad()
            output = seeded(model, *inputs)
            if output.requires_grad:
                output.square().sum().backward()
        outputs = [seeded(model, *inputs) for model in (gm, wrapped)]
        torch.testing.assert_close(*outputs)
        for ours, theirs in zip(grads(gm), grads(wrapped), strict=True):
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs)
            else:
                assert not any(grad is not None and grad.any() for grad in (ours, theirs))
    with torch.no_grad(), llfx.frozen(gm):
        output = gm(*inputs)
        torch.testing.assert_close(output, wrapped(*inputs))


COEFFICIENTS = st.sampled_from([-1.0, 0, 0.5, 1, 2.5, "tensor", "rows"])


def coefficient(kind: Any, batch: int) -> Any:
    if kind == "tensor":
        return torch.tensor(-0.3, dtype=torch.float64)
    return torch.linspace(-1, 1, batch, dtype=torch.float64) if kind == "rows" else kind


@pytest.mark.broad
@settings(max_examples=6, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=2),
    acting=st.sampled_from([None, [], ["fr"], ["de"], ["de", "fr"]]),
    scales=st.dictionaries(st.sampled_from(["fr", "de"]), COEFFICIENTS),
)
def test_a_switched_graph_equals_the_switched_wrapper(
    blocks: list[type[nn.Module]], acting: list[str] | None, scales: dict[str, Any]
) -> None:
    gm, wrapped, _ = pair(SPEC, *blocks, example=(ids(2, 5),))
    chosen = {name: coefficient(kind, 3) for name, kind in scales.items()}
    for model in (gm, wrapped):
        llfx.active(model, acting)
        if chosen:
            llfx.scaled(model, chosen)
    assert_equal(gm, wrapped, ids(3, 4, seed=1))


@pytest.mark.broad
@pytest.mark.parametrize("base", broad_after(1, [None, []]))
def test_none_is_the_frozen_model_and_no_names_are_all_adapters(base: Any) -> None:
    gm, wrapped, model = pair(SPEC, ResidualMLP, example=(ids(2, 5),))
    x = ids(3, 4)
    for each in (gm, wrapped):
        both = each(x)
        assert not torch.equal(both, model(x))
        with llfx.active(each, base):
            assert torch.equal(each(x), model(x))
            with llfx.active(each):
                assert torch.equal(each(x), both)
            assert torch.equal(each(x), model(x))
        assert torch.equal(each(x), both)


@pytest.mark.parametrize("name", broad_after(1, ["fr", None, "de"]))
def test_named_adapters_act_like_wrappers_of_their_own(name: str | None) -> None:
    gm, _, model = pair(SPEC, ResidualMLP, GatedMLP, example=(ids(2, 5),))
    alone = llfx.wrap(model, list(SPEC["de"]) if name == "de" else SPEC["fr"], (ids(2, 5),)) if name else model
    if name is not None:
        values = llfx.adapter_state_dict(gm)
        own = {key: values[f"{key}_{name}"] for key in llfx.adapter_state_dict(alone)}
        llfx.load_adapter_state_dict(alone, own)
    with llfx.active(gm, [] if name is None else name):
        torch.testing.assert_close(gm(ids(3, 4)), alone(ids(3, 4)))


def variants() -> list[Variant]:
    names = sorted(set(llfx.registry()) - {"AntiPaSTO", "AntiPaSTOAblate", "EVA", "TrainableTokens"})
    return [llfx.registry()[name](target_names=(".",)) for name in names]


def is_everyday(variant: Variant) -> bool:
    return type(variant).__name__ in {"LoRA", "DoRA", "HRA", "IA3", "OFT", "Full"}


@pytest.mark.parametrize(
    "variant", broad_after(2, slow_unless(is_everyday, variants())), ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_is_the_adapter_and_zero_the_base_to_the_bit(variant: Variant, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(dtype).eval()
    x = torch.randn(3, 256).to(dtype)
    gm = llfx.rewrite(model, variant, (x,))
    fill(gm)
    full = gm(x)
    assert not torch.equal(full, model(x))
    for of_zero, of_one in ((0.0, 1.0), (torch.zeros(3), torch.ones(3))):
        with llfx.scaled(gm, of_one):
            assert torch.equal(gm(x), full)
        with llfx.scaled(gm, of_zero):
            assert torch.equal(gm(x), model(x))


@pytest.mark.broad
@pytest.mark.parametrize("example", [None, (ids(2, 5),)], ids=["traced", "exported"])
def test_rows_of_one_batch_equal_the_same_rows_one_by_one(example: Any) -> None:
    gm, _, _ = pair(SPEC, GatedMLP, example=example)
    scales = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    batch = ids(3, 4)
    if example is None:
        with llfx.scaled(gm, scales), pytest.raises(llfx.AdapterError, match="has no shapes"):
            gm(batch)
        return
    with llfx.scaled(gm, scales):
        together = gm(batch)
    for row in range(3):
        with llfx.scaled(gm, float(scales[row])):
            torch.testing.assert_close(together[row : row + 1], gm(batch[row : row + 1]))


def test_rows_that_are_joined_or_of_a_fixed_batch_are_refused() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lin(x.flatten(0, 1))
            return y

    x = torch.randn(2, 3, 4)
    for gm, why in (
        (llfx.rewrite(Joined(), llfx.LoRA(r=2, target_names=(".",)), (x,)), "joined"),
        (llfx.rewrite(Joined(), llfx.LoRA(r=2, target_names=(".",)), (x,), dynamic_shapes=None), "fixed"),
    ):
        with llfx.scaled(gm, torch.ones(2)), pytest.raises(llfx.AdapterError, match=why):
            gm(x)


@pytest.mark.broad
@pytest.mark.parametrize("rows", broad_after(1, [2, 4]))
def test_another_number_of_coefficients_than_of_rows_is_an_error(rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    gm, wrapped, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    uses: list[Any] = [lambda m: llfx.scaled(m, torch.ones(rows)), lambda m: llfx.by_row(m, ["fr"] * rows)]
    for model in (gm, wrapped):
        for use in uses:
            with (
                use(model),
                pytest.raises(llfx.CallError, match=f"There are {rows} coefficients .* and 3 rows. The way out"),
            ):
                model(ids(3, 4))
    assert not capsys.readouterr().err  # torch.fx prints the line of a graph that fails


@pytest.mark.broad
def test_switches_hold_at_tied_weights_and_with_checkpointed_layers() -> None:
    model = net(GatedMLP, ResidualMLP, tied=True).double()
    gm: Any = llfx.rewrite(model, SPEC, (ids(2, 5),), checkpoint_layers=True)
    wrapped = llfx.wrap(model, SPEC, (ids(2, 5),))
    fill(gm)
    same(gm, wrapped)
    for names in ("fr", "de"):
        for each in (gm, wrapped):
            llfx.active(each, names)
            llfx.scaled(each, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        assert_equal(gm, wrapped, ids(3, 4))
    llfx.scaled(gm, 0.5)
    torch.testing.assert_close(llfx.merge(gm)(ids(3, 4)), gm(ids(3, 4)))
    assert torch.equal(llfx.remove(gm)(ids(3, 4)), model(ids(3, 4)))


@pytest.mark.broad
def test_a_copy_has_the_switches_of_then_and_follows_its_own() -> None:
    gm, _, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    llfx.active(gm, "fr")
    expected = gm(ids(3, 4))
    copies = [copy.deepcopy(gm), llfx.optimize(gm), llfx.capture(gm)]
    llfx.active(gm, "de")
    for each in copies:
        torch.testing.assert_close(each(ids(3, 4)), expected)
    assert llfx.verify(gm, net(GatedMLP).double(), (ids(2, 5),)).ok


@pytest.mark.broad
def test_a_coefficient_gets_a_gradient() -> None:
    gm, wrapped, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    found = []
    for model in (gm, wrapped):
        c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        with llfx.scaled(model, c):
            model(ids(3, 4)).square().sum().backward()
        found.append(c.grad)
    torch.testing.assert_close(found[0], found[1])
    assert found[0] is not None
    assert found[0] != 0


@pytest.mark.broad
def test_each_scope_takes_back_its_own_change_alone() -> None:
    gm, _, _ = pair(SPEC, GatedMLP)
    with llfx.active(gm, "fr"):
        with llfx.scaled(gm, 0.5, "fr"):
            llfx.active(gm, "de")
            llfx.scaled(gm, 2, "de")
        assert gm.switches.acting == ("de",)
        assert list(gm.switches.scales) == ["de"]
    assert gm.switches.acting is None
    with pytest.raises(RuntimeError), llfx.active(gm, []):
        raise RuntimeError
    assert gm.switches.acting is None


@pytest.mark.parametrize("adapt", [llfx.rewrite, llfx.wrap])
def test_the_adapter_that_is_set_acts_and_trains_alone(adapt: Callable[[nn.Module, Any], Any]) -> None:
    model = adapt(double_net(GatedMLP), SPEC)
    fill(model)
    everything = llfx.adapter_parameters(model)
    x = ids(3, 6)
    for name in ("fr", "de"):
        with llfx.active(model, name):
            expected = model(x)
        llfx.set_adapter(model, name)
        assert torch.equal(model(x), expected)
        alone = llfx.adapter_parameters(model)
        model(x).square().sum().backward()
        assert {id(one) for one in everything if one.grad is not None} == {id(one) for one in alone}
        assert all(one.grad.any() for one in alone if one.grad is not None)
        model.zero_grad(set_to_none=True)
    llfx.set_adapter(model, ["fr", "de"])
    assert list(map(id, llfx.adapter_parameters(model))) == list(map(id, everything))
    with pytest.raises(llfx.ConfigError, match="no adapter 'it'"):
        llfx.set_adapter(model, "it")
    assert list(map(id, llfx.adapter_parameters(model))) == list(map(id, everything))


@pytest.mark.broad
def test_switching_compiles_once_for_each_set_and_never_for_a_coefficient() -> None:
    gm, wrapped, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    torch.compiler.reset()
    compiled: Any = torch.compile(gm, backend="eager")
    counters.clear()
    x = ids(3, 4)
    with torch.no_grad():
        for step in range(100):
            names: Any = ([], "fr", "de", ["fr", "de"])[step % 4]
            llfx.active(gm, names), llfx.active(wrapped, names)
            torch.testing.assert_close(compiled(x), wrapped(x))
        frames = counters["stats"]["unique_graphs"]
        assert frames == 4
        for step in range(50):
            for model in (gm, wrapped):
                llfx.active(model), llfx.scaled(model, 0.1 * step - 2)
            torch.testing.assert_close(compiled(x), wrapped(x))
        assert counters["stats"]["unique_graphs"] == frames + 1


SWITCHES = (lambda m: llfx.active(m, "de"), lambda m: llfx.scaled(m, {"fr": 0.3, "de": -2}))


@pytest.mark.broad
@pytest.mark.parametrize("switch", slow_unless(SWITCHES[1:].__contains__, SWITCHES))
def test_exports_and_merges_compute_what_the_switches_say(switch: Callable[[nn.Module], Any]) -> None:
    gm, _, model = pair(SPEC, GatedMLP, ResidualMLP, example=(ids(2, 5),))
    x = ids(3, 4)
    with switch(gm):
        expected = gm(x)
        torch.testing.assert_close(llfx.merge(gm)(x), expected)
        exported = torch.export.export(gm, (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), expected)
        torch.testing.assert_close(torch.export.export(gm, (x,), strict=True).module()(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(gm)(x), expected)
        torch.testing.assert_close(llfx.program(gm)(x), expected)
    again = exported.module()
    torch.testing.assert_close(llfx.merge(again)(x), expected)
    assert torch.equal(llfx.remove(again)(x), model(x))
    assert not torch.equal(gm(x), expected)


@pytest.mark.broad
def test_rows_of_coefficients_are_not_folded_exported_or_saved(tmp_path: Any) -> None:
    gm, _, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    with llfx.scaled(gm, torch.ones(3)):
        for use in (lambda: llfx.merge(gm), lambda: torch.export.export(gm, (ids(3, 4),)), lambda: llfx.program(gm)):
            with pytest.raises(llfx.AdapterError, match="one coefficient for each row"):
                use()
    with llfx.scaled(gm, 0.5):
        exported: Any = torch.export.export(gm, (ids(3, 4),)).module()
    with pytest.raises(llfx.AdapterError, match=r"the coefficient 0\.5"):
        llfx.save(exported, tmp_path / "file")


@pytest.mark.broad
def test_an_adapted_model_follows_switches_in_calls_and_in_generate() -> None:
    model: Any = LlamaForCausalLM(tiny_llama()).eval()
    adapted: Any = llfx.adapt(model, {"fr": llfx.LoRA(r=2), "de": llfx.IA3()})
    fill(adapted)
    alone: Any = llfx.wrap(model, llfx.IA3())
    values = llfx.adapter_state_dict(adapted)
    llfx.load_adapter_state_dict(alone, {k: values[f"{k}_de"] for k in llfx.adapter_state_dict(alone)})
    prompt = torch.randint(1, 20, (2, 4))
    settings: Any = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cases: list[Any] = [([], model), ("de", alone)]
    for names, expected in cases:
        with llfx.active(adapted, names):
            torch.testing.assert_close(adapted(prompt).logits, expected(prompt).logits)
            assert torch.equal(adapted.generate(prompt, **settings), expected.generate(prompt, **settings))
    with llfx.scaled(adapted, torch.tensor([0.0, 1.0])), llfx.active(adapted, "de"):
        both = adapted(prompt).logits
    torch.testing.assert_close(both[:1], model(prompt[:1]).logits)
    torch.testing.assert_close(both[1:], alone(prompt[1:]).logits)
    with llfx.active(adapted, "de"):
        merged: LlamaForCausalLM = llfx.merge(adapted)
    torch.testing.assert_close(merged(prompt).logits, alone(prompt).logits)


@pytest.mark.slow
def test_a_marked_model_follows_active_and_refuses_coefficients() -> None:
    torch.compiler.reset()
    model = net(GatedMLP).eval()
    x = ids(3, 4)
    marked = llfx.backend(SPEC, inner="eager").adapt(model, x)
    fill(marked)
    compiled: Any = torch.compile(marked, backend="lora_lite_fx")
    wrapped = llfx.wrap(model, SPEC, (x,))
    same(marked, wrapped)
    chosen: list[Any] = ["fr", "de", [], None]
    for names in chosen:
        llfx.active(marked, names), llfx.active(wrapped, names)
        torch.testing.assert_close(compiled(x), wrapped(x))
    llfx.active(marked)
    with llfx.scaled(marked, 0.5), pytest.raises(llfx.AdapterError, match="does not scale"):
        compiled(x)


def test_an_input_that_is_called_like_a_coefficient_is_refused() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale_fr: Tensor) -> Tensor:
            y: Tensor = self.lin(x) * scale_fr
            return y

    inputs = (torch.ones(2, 3, 4), torch.ones(()))
    gm = llfx.rewrite(Takes(), {"fr": llfx.LoRA(r=2, target_names=("lin",))}, inputs)
    with llfx.scaled(gm, 0.5), pytest.raises(llfx.AdapterError, match="The model has an input 'scale_fr', and this"):
        gm(*inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    broad_after(
        1,
        [
            (lambda gm: llfx.active(gm, "it"), "no adapter 'it'; it has 'fr', 'de'"),
            (lambda gm: llfx.scaled(gm, 1, "it"), "no adapter 'it'"),
            (lambda gm: llfx.scaled(gm, {"it": 1}), "no adapter 'it'"),
            (lambda gm: llfx.scaled(gm, {"fr": 1}, "fr"), "not in both"),
            (lambda gm: llfx.scaled(gm, float("nan")), "a finite number"),
            (lambda gm: llfx.scaled(gm, torch.tensor([1.0, float("inf")])), "NaN or infinite"),
            (lambda gm: llfx.scaled(gm, True), "is a number"),
            (lambda gm: llfx.scaled(gm, cast(Any, [1])), "is a number"),
            (lambda gm: llfx.scaled(gm, torch.ones(2, 2)), r"\(\) or \(batch,\)"),
            (lambda gm: llfx.active(llfx.remove(gm), "fr"), "has no adapters"),
            (lambda gm: llfx.active(torch.export.export(gm, (ids(2, 5),)).module(), "fr"), r"optimize\(model\)"),
        ],
        several=True,
    ),
)
def test_bad_switches_are_refused_and_change_nothing(call: Callable[[Any], Any], message: str) -> None:
    gm, _, _ = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    before = gm.switches
    with pytest.raises(llfx.AdapterError, match=message):
        call(gm)
    assert gm.switches is before


@pytest.mark.broad
def test_what_is_off_costs_nothing() -> None:
    gm, _, model = pair(SPEC, GatedMLP, example=(ids(2, 5),))
    base = llfx.capture(model, (ids(2, 5),))
    llfx.active(gm, [])
    for name in ("training", "inference"):
        nodes = [len(llfx.program(each, name).graph.nodes) for each in (gm, base)]
        assert nodes[0] == nodes[1]
    gm(ids(3, 4)).sum()
    assert not gm(ids(3, 4)).requires_grad
