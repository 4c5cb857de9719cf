"""Check variants that look like a mistake and are right, and what rewrite and load still refuse of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from tests.support.refusals import WAYS, Mine, Net, X


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[llfx.Variant]], None]:
    """Register a variant until the end of the test."""
    return lambda cls: monkeypatch.setitem(_REGISTRY, cls.__name__, cls)


def test_load_refuses_a_variant_that_has_changed(register: Any, tmp_path: Path) -> None:
    class Changing(Mine):
        pass

    register(Changing)
    llfx.save(llfx.rewrite(Net(), Changing(target_names="fc"), (X,)), tmp_path / "file")
    Changing.params = lambda self, site: {"bias": llfx.ParamSpec((site.d_out,))}  # type: ignore[method-assign]
    with pytest.raises(llfx.CheckpointError) as caught:
        llfx.load(Net(), tmp_path / "file", (X,))
    assert "Changing.params at 'fc' (d_in=4, d_out=8) calls a tensor 'bias', and the module" in str(caught.value)


# What looks like a mistake and is right.


class WritesOwnResults(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        h = F.linear(x, p.lora_A)
        h[..., 0] = 0.5
        y = base(x)
        y += F.linear(h * torch.tensor(1.5), p.lora_B)
        return y


class WritesItsWeight(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        weight = base.weight + p.lora_B @ p.lora_A
        weight[0] = 0
        return base(x, weight=weight)


def test_a_write_to_a_weight_that_base_is_given_is_refused_by_rewrite(register: Any) -> None:
    register(WritesItsWeight)
    with pytest.raises(
        llfx.ConfigError, match=r"WritesItsWeight\.forward at 'fc' writes in place to the weight or bias"
    ):
        llfx.rewrite(Net(), WritesItsWeight(target_names="fc"), (X,))


class Branches(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        y = base(x)
        return torch.where(y > 0, 2 * y, y) + p.lora_B.sum(1)


class RanksDiffer(Mine):
    def forward(self, x: Tensor, base: Any, p: Any) -> Any:
        return base(x) + (self.update(x, p) if x.dim() == 2 else 0 * base.weight.sum())


@pytest.mark.parametrize("cls", [WritesOwnResults, Branches, RanksDiffer])
def test_right_variants_are_right_by_rewrite_and_wrap(cls: type[Mine], register: Any) -> None:
    register(cls)
    outputs = []
    for way in WAYS:
        model = way(Net(), cls(target_names="fc"), (X,))
        for i, parameter in enumerate(llfx.adapter_parameters(model)):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
        y = model(X)
        y.sin().sum().backward()
        outputs.append([y, *(parameter.grad for parameter in llfx.adapter_parameters(model))])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0][0], Net()(X))


def test_torch_may_draw_and_the_numbers_differ_by_call(register: Any) -> None:
    class Noise(Mine):
        def forward(self, x: Tensor, base: Any, p: Any) -> Any:
            return base(x) + self.update(torch.rand_like(x), p)

    register(Noise)
    for way in WAYS:
        model = way(Net(), Noise(target_names="fc"), (X,))
        torch.manual_seed(0)
        first, second = model(X), model(X)
        torch.manual_seed(0)
        torch.testing.assert_close(first, model(X), rtol=0, atol=0)
        assert not torch.equal(first, second)
