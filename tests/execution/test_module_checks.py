"""What is put into the modules of a graph acts, or the next call says that it does not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_lite_fx as llfx
from tests.support.captured import captured
from tests.support.conformance import randomise

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class Net(nn.Module):
    shift: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x if self.shift is None else x + self.shift


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.weight


def net() -> nn.Module:
    return Net().eval()


def adapted() -> Any:
    gm = llfx.rewrite(captured(net, inputs=(X,))[1], llfx.LoRA(r=2, target_names=("down",)))
    randomise(gm, 0)
    return gm


def bias(width: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, width))


def linear(with_bias: bool) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 4, bias=with_bias)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a bias": (lambda gm: setattr(gm.first, "bias", bias()), "'first.bias' is set, and the model had none"),
    "a bias in a layer": (lambda gm: setattr(gm.layers[0].up, "bias", bias()), "'layers.0.up.bias' is set"),
    "a tensor": (lambda gm: setattr(gm.first, "bias", torch.ones(4)), "'first.bias' is set"),
    "a buffer": (lambda gm: setattr(gm, "shift", torch.ones(4)), "'shift' is set"),
    "a registered buffer": (lambda gm: gm.register_buffer("shift", torch.ones(4)), "'shift' is set"),
    "a linear with a bias": (lambda gm: setattr(gm, "first", linear(True)), "'first.bias' is set"),
    "a norm": (lambda gm: setattr(gm, "norm", Other()), "'norm' is a Other since the graph was captured"),
    "a norm of its class": (lambda gm: setattr(gm, "norm", nn.LayerNorm(4, eps=0.5)), "'norm' is a LayerNorm since"),
    "an activation": (lambda gm: setattr(gm.layers[1], "act", nn.ReLU()), "'layers.1.act' is a ReLU since"),
    "a class": (lambda gm: setattr(gm.norm, "__class__", Other), "'norm' is a Other since"),
    "the class of a layer": (lambda gm: setattr(gm.layers[0], "__class__", Other), "'layers.0' is a Other since"),
    "a layer": (lambda gm: gm.layers.__setitem__(0, Layer()), "'layers.0' is a Layer since"),
}


@pytest.mark.parametrize("is_called", [True, False], ids=["after a call", "before any call"])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_does_not_run_is_refused_by_name(change: Any, message: str, is_called: bool) -> None:
    gm = adapted()
    if is_called:
        gm(X)
    change(gm)
    for _ in range(2):
        with pytest.raises(llfx.AdapterError, match=message):
            gm(X)


def wrapped(gm: Any) -> None:
    gm.layers[0] = torch.compile(gm.layers[0], backend="eager")


class Checkpointed(nn.Module):
    """Keeps a layer as the wrapper of torch's checkpointing does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


def rewrapped(gm: Any) -> None:
    gm.norm = Checkpointed(gm.norm)
    gm.norm.weight, gm.norm.bias = (getattr(gm.norm._checkpoint_wrapped_module, name) for name in ("weight", "bias"))


def parametrized(gm: Any) -> None:
    parametrize.register_parametrization(gm.norm, "weight", nn.Identity())


def of_a_subclass(gm: Any) -> None:
    gm.layers[0].__class__ = type("Sharded", (type(gm.layers[0]),), {})  # as fully_shard


ALIKE: dict[str, Callable[[Any], object]] = {
    "a copy of a module": lambda gm: setattr(gm, "norm", copy.deepcopy(gm.norm)),
    "a copy of a layer": lambda gm: gm.layers.__setitem__(0, copy.deepcopy(gm.layers[0])),
    "a compiled layer": wrapped,
    "a wrapper": rewrapped,
    "a parametrization": parametrized,
    "a subclass": of_a_subclass,
    "a tensor of one's own": lambda gm: gm.norm.register_buffer("mine", torch.ones(3)),
    "an adapter": lambda gm: llfx.add(gm, {"other": llfx.LoRA(r=2, target_names=("first",))}),
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_what_computes_alike_goes_on(change: Callable[[Any], object]) -> None:
    gm = adapted()
    expected = gm(X)
    change(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # of torch.compile
        assert torch.equal(gm(X), expected)


FOLLOWED: dict[str, Callable[[Any], object]] = {
    "no bias": lambda model: setattr(model.layers[0].down, "bias", None),
    "another linear": lambda model: setattr(model, "first", linear(False)),
    "another bias": lambda model: setattr(model.norm, "bias", bias()),
}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
def test_tensors_that_are_replaced_or_taken_away_act(change: Callable[[Any], object]) -> None:
    base, graph = captured(net, inputs=(X,))
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names=("layers.1.down",)))
    before = gm(X)
    for each in (gm, base):
        change(each)
    assert torch.allclose(gm(X), base(X), atol=1e-6)
    assert not torch.allclose(gm(X), before, atol=1e-3)


@pytest.mark.parametrize("adapt", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize("config", [llfx.Full(target_names="down"), llfx.DoRA(r=2, target_names="down")], ids=repr)
def test_a_bias_that_an_adapter_computes_with_is_refused_by_name_when_it_is_taken_away(config: Any, adapt: Any) -> None:
    base = captured(net, inputs=(X,))[0]
    model = adapt(base, config, (X,))
    expected = model(X)
    site = model.layers[0].down
    site, before = getattr(site, "base", site), site.bias
    site.bias = None
    if adapt is llfx.wrap and isinstance(config, llfx.DoRA):  # runs on the module as it is
        assert not torch.allclose(model(X), expected, atol=1e-3)
        return
    for _ in range(2):
        with pytest.raises(llfx.AdapterError, match=r"'layers\.0\.down.*' was taken away"):
            model(X)
    site.bias = before
    assert torch.equal(model(X), expected)


def test_a_forward_that_is_put_on_a_module_inside_is_told_of_and_one_on_a_layer_acts() -> None:
    gm = adapted()
    expected = gm(X)
    gm.layers[0].up.forward = lambda x: x * 0
    with pytest.warns(UserWarning, match=r"forward was replaced on 'layers\.0\.up', and does not act"):
        assert torch.equal(gm(X), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gm(X), expected)
        gm = adapted()
        gm.layers[0].forward = lambda x, **_: x * 0
        assert not torch.allclose(gm(X), expected)
