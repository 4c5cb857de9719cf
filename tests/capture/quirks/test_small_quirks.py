"""What models do otherwise, or cannot do, in a trace, and what changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.distributions.gumbel import Gumbel

import lora_lite_fx as llfx
from lora_lite_fx.capture.quiet_torch import failures_unlogged
from lora_lite_fx.capture.quirks.deep_copies import DeepCopiesAreClones
from lora_lite_fx.torch_compile.record_run import record_run


class Choosing(nn.Linear):
    """Chooses in training as GroupViT does, by numbers of a distribution that checks its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        if self.training:
            logits = logits + Gumbel(torch.full((), 0.0), torch.full((), 1.0)).sample(logits.shape)
        return logits.softmax(-1)


@pytest.mark.parametrize("training", [True, False])
def test_a_distribution_is_drawn_from_in_a_graph(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # as before torch.compile switched it off
    model, x = Choosing(4, 3).train(training), torch.randn(5, 4)
    gm = llfx.capture(model, (torch.randn(2, 4),))
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(gm(x), expected)


class Parts(nn.Module):
    """Has parts, and no forward of its own, as Bark."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = nn.ModuleList()
        self.semantic = nn.Linear(4, 4)


def test_a_model_that_has_only_parts_is_refused_with_one_of_them() -> None:
    with pytest.raises(llfx.CaptureError, match=r"Parts has no forward\(\).*such as model\.semantic"):
        llfx.capture(Parts(), (torch.randn(2, 4),))


class FillsATable(nn.Linear):
    """Fills a part of a new table by its `data`, as CogVideoX does, and adds the table."""

    def forward(self, input: Tensor) -> Tensor:
        table = input.new_zeros(input.shape)
        table.data[:, 1:].copy_(input.detach()[:, 1:].cos())
        return super().forward(input + table) * self.weight.data.sum()


def test_writes_to_the_data_of_a_tensor_are_in_the_graph() -> None:
    model = FillsATable(4, 4)
    gm = llfx.capture(model, (torch.randn(3, 4),))
    x, same = torch.randn(5, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    same.data.copy_(x)
    y, expected = gm(x), model(same)
    torch.testing.assert_close(y, expected)
    (gradient,), (its,) = torch.autograd.grad(y.sum(), [x]), torch.autograd.grad(expected.sum(), [same])
    torch.testing.assert_close(gradient, its)


class Copies(nn.Linear):
    """Copies numbers that it makes, as Dory copies layers of its cache."""

    def forward(self, input: Tensor) -> Tensor:
        half = copy.deepcopy({"one": torch.tensor(0.5), "many": input / 2})
        return super().forward(half["many"]) + half["one"]


def test_deep_copies_are_in_the_graph() -> None:
    model, x = Copies(4, 4), torch.randn(5, 4)
    torch.testing.assert_close(llfx.capture(model, (torch.randn(3, 4),))(x), model(x))
    assert record_run(model, (x,), {}).graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)


def test_deep_copies_of_tensors_without_data_have_none() -> None:
    with DeepCopiesAreClones(), FakeTensorMode(), failures_unlogged():
        constant = torch.tensor(4)
        twice = copy.deepcopy([constant, constant])
    assert twice[0] is twice[1]
    assert twice[0].shape == ()
    assert int(twice[0]) == 4
