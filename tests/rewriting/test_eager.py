"""Check the eager wrapper as a module: tensors that sites share, conversions, copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import contract
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from tests.support.refusals import Mine


class OneGate(Mine):
    """One trained gate for all sites."""

    def params(self, site: Site) -> Mapping[str, llfx.ParamSpec]:
        return {"lora_shared_g": llfx.ParamSpec((6,), init="ones")}

    def forward(self, x: Tensor, base: Any, p: Any) -> Tensor:
        y: Tensor = base(x * p.lora_shared_g)
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, "OneGate", OneGate)


def start(model: nn.Module) -> nn.Module:
    """Give the adapter values that it does not start with."""
    for i, parameter in enumerate(llfx.adapter_parameters(model)):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return model


def test_a_trained_tensor_that_sites_share_is_one_parameter() -> None:
    wrapped = start(llfx.wrap(Net(), OneGate(target_names=("a", "b")), (X,)))
    names = [name for name, _ in wrapped.named_parameters(remove_duplicate=False)]
    assert names == ["lora_shared_g", "a.base.weight", "a.base.bias", "b.base.weight", "b.base.bias"]
    assert list(wrapped.named_buffers()) == []
    assert list(wrapped.state_dict()) == names


@pytest.mark.parametrize("convert", [nn.Module.train, nn.Module.double, copy.deepcopy])
def test_it_trains_like_that_of_a_graph_after_conversions_and_copies(convert: Any) -> None:
    results = []
    for way in (llfx.wrap, llfx.rewrite):
        model = convert(start(way(Net(), OneGate(target_names=("a", "b")), (X,))))
        optimizer = torch.optim.SGD(llfx.adapter_parameters(model), lr=0.5)
        x = X.to(next(model.parameters()).dtype)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
        results.append((model(x), *llfx.adapter_parameters(model)))
    torch.testing.assert_close(*results)
    assert (results[0][1] - 1).abs().max() > 0.1


def test_a_replaced_shared_parameter_is_read_by_the_next_call() -> None:
    wrapped = start(llfx.wrap(Net(), OneGate(target_names=("a", "b")), (X,)))
    other = torch.full((6,), 0.25)
    expected = torch.func.functional_call(Net(), {}, (X / 4,))  # the gate of the first layer
    with torch.no_grad():
        called = torch.func.functional_call(wrapped, {"lora_shared_g": other}, (X,))
        wrapped.lora_shared_g = nn.Parameter(other)
        torch.testing.assert_close(wrapped(X), called, rtol=0, atol=0)
    assert not torch.allclose(called, expected)


@pytest.mark.parametrize("cfg", [llfx.LoRA(r=2, target_names=("a", "b")), llfx.VeRA(r=2, target_names=("a", "b"))])
@pytest.mark.parametrize("inputs", [None, (X,)])
def test_a_copy_of_a_wrapped_model_is_a_model_of_its_own(cfg: llfx.Variant, inputs: Any) -> None:
    wrapped = start(llfx.wrap(Net(), cfg, inputs))
    copied = copy.deepcopy(wrapped)
    torch.testing.assert_close(copied(X), wrapped(X), rtol=0, atol=0)
    before = wrapped(X)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(copied):
            parameter.mul_(2)
    torch.testing.assert_close(wrapped(X), before, rtol=0, atol=0)
    assert not torch.allclose(copied(X), before)


def test_a_module_with_a_computed_weight_can_be_copied() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.a)
    wrapped = start(llfx.wrap(model, llfx.LoRA(r=2, target_names="a"), (X,)))
    torch.testing.assert_close(copy.deepcopy(wrapped)(X), wrapped(X), rtol=0, atol=0)


def test_a_tensor_cannot_have_a_name_of_the_wrapper() -> None:
    wrapper: Any = llfx.wrap(Net(), llfx.LoRA(r=2, target_names="a"), (X,)).a
    names = (*vars(wrapper), *vars(type(wrapper)), *dict(wrapper.named_children()))
    own = {name for name in names if name[0] != "_" and not hasattr(nn.Module, name)}
    assert {"base", "site", "weight", "bias", "training"} <= own <= contract._OF_THE_SITE


@pytest.mark.broad
def test_it_runs_in_torch_compile() -> None:
    torch._dynamo.reset()
    wrapped = start(llfx.wrap(Net(), OneGate(target_names=("a", "b")), (X,)))
    torch.testing.assert_close(torch.compile(wrapped, backend="eager", fullgraph=True)(X), wrapped(X))


def test_a_shared_parameter_trains_in_a_model_that_carries_its_adapters() -> None:
    torch._dynamo.reset()
    marked = llfx.backend(OneGate(target_names=("a", "b"))).adapt(Net(), X)
    assert [name for name, _ in marked.named_buffers()] == []
    start(marked)
    graph = start(llfx.rewrite(Net(), OneGate(target_names=("a", "b")), (X,)))
    outputs = torch.compile(marked, backend=llfx.backend(inner="eager"))(X), graph(X)
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad(y.sin().sum(), llfx.adapter_parameters(adapted))
        for y, adapted in zip(outputs, (marked, graph), strict=True)
    ]
    torch.testing.assert_close(*gradients)


class ScaledLinear(nn.Linear):
    """A linear with a factor of its own, which the model reads."""

    factor = 0.5

    def grown(self, x: Tensor) -> Tensor:
        return x * self.factor


class ReadsItsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = ScaledLinear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.a.grown(x.to(self.a.weight.dtype).view(-1, self.a.in_features)))
        return y


def test_a_model_may_read_attributes_of_a_wrapped_layer() -> None:
    cfg = llfx.LoRA(r=2, target_names=("a",))
    model = ReadsItsLayer()
    wrapped, gm = start(llfx.wrap(model, cfg, (X,))), start(llfx.rewrite(model, cfg, (X,)))
    torch.testing.assert_close(wrapped(X), gm(X))
    layer: Any = wrapped.a
    assert (layer.in_features, layer.factor) == (6, 0.5)
    assert not hasattr(layer, "nothing")
    copied: Any = copy.deepcopy(layer)
    assert copied.factor == 0.5
    assert copied.base is not layer.base
