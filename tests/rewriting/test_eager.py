"""Check the eager wrapper as a module: tensors that sites share, conversions, copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import contract
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.sites.site import Site
from tests.support.refusals import Mine
from tests.support.selection import broad_after


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


PARAMETRIZATIONS: dict[str, Any] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight_norm by hooks": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", broad_after(1, PARAMETRIZATIONS))
@pytest.mark.parametrize(
    "cfg",
    [llfx.Full(target_names="a"), llfx.Full(weight=False, target_names="a"), llfx.HiRA(r=2, target_names="a")],
    ids=["Full", "bias", "HiRA"],
)
def test_a_parametrized_weight_is_replaced_read_and_trained_as_in_a_graph(name: str, cfg: llfx.Variant) -> None:
    model = Net()
    PARAMETRIZATIONS[name](model.a)
    models = start(llfx.rewrite(model, cfg, (X,))), start(llfx.wrap(model, cfg, (X,)))
    outputs, slopes = [], []
    for each in models:
        each.requires_grad_(True)
        outputs.append(each(X))
        outputs[-1].sin().sum().backward()
        slopes.append({path.replace("base.", ""): p.grad for path, p in each.named_parameters()})
    assert not torch.allclose(outputs[0], model(X))
    torch.testing.assert_close(*outputs)
    assert slopes[0].keys() == slopes[1].keys()
    for path, slope in slopes[0].items():
        other = slopes[1][path]
        assert (slope is None) == (other is None), path
        if slope is not None:
            torch.testing.assert_close(other, slope)


def test_a_parametrized_convolution_is_replaced() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)))
    cfg, x = llfx.Full(target_names="0"), torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(start(llfx.wrap(model, cfg, (x,)))(x), start(llfx.rewrite(model, cfg, (x,)))(x))


class TwiceRound(nn.Module):
    """Runs its layers in another order than it has them in, and eleven of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(11))
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in reversed(self.layers):
            x = layer(x).tanh()
        return x


FOUR = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.broad
@pytest.mark.parametrize(
    "cfg",
    [
        llfx.LoRA(r=2, target_names="."),
        [llfx.Full(target_names="first"), llfx.DoRA(r=2, target_names="."), llfx.VeRA(r=2, target_names="2")],
        {"fr": llfx.LoRA(r=2, target_names="."), "de": [llfx.IA3(target_names="1"), llfx.HRA(r=2, target_names=".")]},
        llfx.Bank(llfx.LoRA(r=2, target_names="."), slots=2),
    ],
    ids=["one", "stack", "named", "bank"],
)
def test_parameters_have_one_order_by_site_and_name(cfg: Any, tmp_path: Path) -> None:
    model = TwiceRound()
    gm, wrapped = llfx.rewrite(model, cfg, (FOUR,)), llfx.wrap(model, cfg, (FOUR,))
    names = list(llfx.adapter_state_dict(gm))
    sites = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    shared = [""] if any("." not in name for name in names) else []
    assert sites == [*shared, "first", *(f"layers.{i}" for i in range(11))]
    for site in sites:
        of_site = [name for name in names if name.rpartition(".")[0] == site]
        assert of_site == sorted(of_site)
    others = [wrapped]
    if not getattr(cfg, "slots", None):
        others.append(llfx.backend(cfg).adapt(model, FOUR))
    if not isinstance(cfg, dict):
        llfx.save(gm, tmp_path / "file")
        others.append(llfx.load(model, tmp_path / "file", (FOUR,)))
    for each in others:
        assert list(llfx.adapter_state_dict(each)) == names
        ours, theirs = llfx.adapter_parameters(each), llfx.adapter_parameters(gm)
        assert [parameter.shape for parameter in ours] == [parameter.shape for parameter in theirs]


@pytest.mark.broad
def test_the_state_of_an_optimizer_by_index_goes_from_a_graph_to_the_wrapper() -> None:
    cfg = [llfx.LoRA(r=2, target_names="."), llfx.IA3(target_names=".")]
    ways = [start_by_name(way(TwiceRound(), cfg, (FOUR,))) for way in (llfx.rewrite, llfx.wrap)]
    optimizers = [torch.optim.AdamW(llfx.adapter_parameters(model), lr=0.1) for model in ways]
    ways[0](FOUR).sin().sum().backward()
    optimizers[0].step()
    llfx.load_adapter_state_dict(ways[1], {k: v.clone() for k, v in llfx.adapter_state_dict(ways[0]).items()})
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(ways, optimizers, strict=True):
        model.zero_grad()
        model(FOUR).sin().sum().backward()
        optimizer.step()
    for name, value in llfx.adapter_state_dict(ways[0]).items():
        torch.testing.assert_close(llfx.adapter_state_dict(ways[1])[name], value)


def start_by_name(model: nn.Module) -> nn.Module:
    for i, (_, tensor) in enumerate(sorted(llfx.adapter_state_dict(model).items())):
        tensor.normal_(generator=torch.Generator().manual_seed(i))
    return model
