"""Check graphs with adapters: they share the model's storage, take further adapters, and keep tied weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from tests.support.conformance import close, gradients, observe, randomise, unchanged
from tests.support.models import GatedMLP, ResidualMLP, ids, net


@functools.cache
def exported(block: type[nn.Module]) -> fx.GraphModule:
    """Return the graph of `net(block)`, for tests that start from a graph."""
    return llfx.capture(net(block), (ids(2, 5),))


def test_parameters_share_the_models_storage_and_ties_stay_tied() -> None:
    model = net(GatedMLP, tied=True)
    gm = llfx.rewrite(model, llfx.LoRA(r=2), (ids(2, 5),))
    base = {p.data_ptr() for p in model.parameters()}
    frozen = [p for p in gm.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} == base
    assert len(frozen) == len(base)
    assert not {id(p) for p in frozen} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("example_inputs", [None, (ids(2, 5),)], ids=["traced", "exported"])
def test_a_second_rewrite_keeps_the_first_adapter_trainable_and_the_first_graph_as_it_was(
    example_inputs: Any,
) -> None:
    first = llfx.rewrite(net(GatedMLP), llfx.LoRA(r=2), example_inputs)
    randomise(first, 0)
    with unchanged(first):
        second = llfx.rewrite(first, llfx.DoRA(r=2))
        randomise(second, 1)
    assert len(llfx.adapter_parameters(second)) == 3 * (2 + 3)
    _, grads = gradients(second, (ids(3, 4),))
    assert grads.keys() == llfx.adapter_state_dict(second).keys()
    assert llfx.inspect(second)[0].adapters == ("LoRA", "DoRA")


@pytest.mark.broad
def test_a_list_of_configs_is_the_same_as_one_rewrite_after_the_other() -> None:
    configs = [llfx.HRA(r=2), llfx.LoRA(r=2), llfx.IA3(target_names=".")]
    at_once = llfx.rewrite(exported(GatedMLP), configs)
    one_by_one = exported(GatedMLP)
    for cfg in configs:
        one_by_one = llfx.rewrite(one_by_one, cfg)
    randomise(at_once, 0)
    randomise(one_by_one, 0)
    assert torch.equal(at_once(ids(3, 4)), one_by_one(ids(3, 4)))
    assert at_once.graph.python_code("self").src == one_by_one.graph.python_code("self").src


def test_an_exported_program_is_rewritten_and_left_as_it_is() -> None:
    model = net(ResidualMLP)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (ids(2, 5),), dynamic_shapes=([auto, auto],))
    gm = llfx.rewrite(program, llfx.LoRA(r=2))
    assert torch.equal(gm(ids(3, 4)), model(ids(3, 4)))
    assert all(p.requires_grad for p in program.module().parameters())


def test_forward_hooks_of_the_model_stay_and_are_not_shared() -> None:
    model = net(GatedMLP)
    seen: list[str] = []
    model.head.register_forward_hook(lambda *_: seen.append("ran"))
    before = observe(model)
    llfx.rewrite(model, llfx.LoRA(r=2))
    assert observe(model) == before
    seen.clear()
    model(ids(2, 3))
    assert seen == ["ran"]


def test_the_same_seed_gives_the_same_bits() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(llfx.adapter_state_dict(llfx.rewrite(net(GatedMLP), llfx.HRA(r=2), (ids(2, 5),))))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_wrapping_or_rewriting_an_eagerly_wrapped_model_is_refused() -> None:
    wrapped = llfx.wrap(net(GatedMLP), llfx.LoRA(r=2))
    for adapt in (llfx.rewrite, llfx.wrap):
        with pytest.raises(llfx.CaptureError, match="wrapped eagerly already"):
            adapt(wrapped, llfx.LoRA(r=2))


def test_adapters_of_an_unknown_variant_can_be_inspected_and_removed_but_not_merged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gm = llfx.rewrite(exported(GatedMLP), llfx.LoRA(r=2))
    randomise(gm, 0)
    monkeypatch.delitem(_REGISTRY, "LoRA")
    assert llfx.inspect(gm)[0].adapters == ("LoRA",)
    assert torch.equal(llfx.remove(gm)(ids(3, 4)), net(GatedMLP)(ids(3, 4)))
    with pytest.raises(llfx.ConfigError, match="Unknown variant 'LoRA'"):
        llfx.merge(gm)


def test_a_file_loads_onto_a_model_that_has_adapters(tmp_path: Path) -> None:
    stacked = llfx.rewrite(exported(GatedMLP), [llfx.LoRA(r=2), llfx.HRA(r=2)])
    randomise(stacked, 0)
    llfx.save(stacked, tmp_path / "two.safetensors")
    first = llfx.rewrite(exported(GatedMLP), llfx.DoRA(r=2))
    loaded = llfx.load(first, tmp_path / "two.safetensors", stack=True)
    assert llfx.inspect(loaded)[0].adapters == ("DoRA", "LoRA", "HRA")
    state = llfx.adapter_state_dict(loaded)
    for name, tensor in llfx.adapter_state_dict(stacked).items():
        renamed = name.replace("lora_U_2", "lora_U_3") if "lora_U" in name else f"{name}_2"
        assert torch.equal(state[renamed], tensor)


@pytest.mark.parametrize("example_inputs", [None, (ids(2, 5),)], ids=["traced", "exported"])
def test_a_tied_weight_keeps_all_its_names(example_inputs: Any) -> None:
    model = net(GatedMLP, tied=True)
    gm = llfx.rewrite(model, llfx.LoRA(r=2), example_inputs)
    for graph in (gm, llfx.remove(gm), llfx.merge(gm)):
        assert graph.state_dict().keys() >= model.state_dict().keys()
        assert graph.get_parameter("embed.weight") is graph.get_parameter("head.weight")


def test_a_merge_replaces_the_weight_of_a_shared_module_under_all_its_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    for example_inputs in (None, (torch.randn(2, 4),)):
        gm = llfx.rewrite(Twice(), llfx.LoRA(r=2, target_names="."), example_inputs)
        randomise(gm, 0)
        merged = llfx.merge(gm)
        assert merged.get_parameter("first.weight") is merged.get_parameter("second.weight")
        close(merged(torch.ones(3, 4)), gm(torch.ones(3, 4)).detach(), 1e-5, "merged")
