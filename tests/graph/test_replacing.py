"""Another module in the place of one, also where a module calls its layers by a list of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.replacing import replace_modules
from tests.support.conformance import randomise


class Head(nn.Module):
    """Registers its layers, and calls them by a list, as the heads of OneFormer and MaskFormer do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU()]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_wrapped_layer_of_such_a_list_is_called() -> None:
    model, x = Head(), torch.randn(3, 4)
    cfg = llfx.LoRA(r=2, target_names="0")
    gm, wrapped = llfx.rewrite(model, cfg, (x,)), llfx.wrap(model, cfg, (x,))
    for adapted in (gm, wrapped):
        randomise(adapted, 0)
    assert not torch.allclose(gm(x), model(x))
    torch.testing.assert_close(wrapped(x), gm(x))
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in llfx.adapter_parameters(wrapped))


def test_a_module_is_replaced_wherever_a_model_has_it() -> None:
    old, new = nn.Linear(4, 4), nn.Identity()
    model: Any = nn.Sequential(nn.Sequential(old), old)
    model.by_name, model.pair = {"first": old}, (old, [old])
    vars(model)["hidden"] = old
    of_all = model._parameters, model._forward_hooks
    replace_modules(model, {old: new})
    assert all(module is not old for module in model.modules())
    assert model[0][0] is model[1] is model.by_name["first"] is model.pair[0] is model.pair[1][0] is model.hidden is new
    assert of_all == (model._parameters, model._forward_hooks)


def test_the_new_module_may_hold_the_old_one() -> None:
    old = nn.Linear(4, 4)
    model, new = nn.Sequential(old), nn.Sequential(old)
    replace_modules(model, {old: new})
    assert model[0] is new
    assert new[0] is old


def test_modules_that_a_list_holds_trade_places() -> None:
    model: Any = Head()
    first, second = model.layers
    replace_modules(model, {first: second, second: first})
    assert model.layers == [second, first] == [model.get_submodule("0"), model.get_submodule("1")]
