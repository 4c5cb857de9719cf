"""Tensors that a call leaves in modules for the next one, outside of caches, which a graph does not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.survey.cases import cases


class Remembering(nn.Linear):
    """Adds what the call before returned, as RecurrentGemma keeps its states."""

    state: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        result = super().forward(input)
        if self.state is not None:
            result = result + self.state
        self.state = result
        return result


class Tabulating(nn.Linear):
    """Keeps a table, which is the same in each call."""

    table: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.table = torch.arange(float(input.shape[1]))
        return super().forward(input) + self.table[:3]


class Measuring(nn.Linear):
    """Keeps the length of its call, as Funnel does; `scale` may be left out."""

    length = 0

    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:
        self.length = input.shape[0]
        result = super().forward(input) / self.length
        return result if scale is None else result * scale


def test_what_one_call_keeps_for_the_next_is_refused() -> None:
    with pytest.raises(llfx.CaptureError, match=r"keeps 1\.state from one call for the next"):
        llfx.capture(nn.Sequential(nn.Linear(4, 4), Remembering(4, 3)), (torch.randn(2, 4),))


class Counting(nn.Linear):
    """Counts its calls, and mixes in a part of its input that grows with them."""

    calls = 0

    def __init__(self, only_in_training: bool) -> None:
        super().__init__(4, 4)
        self.only_in_training = only_in_training

    def forward(self, input: Tensor) -> Tensor:
        if self.training or not self.only_in_training:
            self.calls += 1
        return super().forward(input) + self.calls * input


@pytest.mark.parametrize("only_in_training", [False, True])
def test_a_number_that_one_call_keeps_for_the_next_is_refused(only_in_training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counting(only_in_training))
    with pytest.raises(llfx.CaptureError, match=r"keeps 1\.calls from one call for the next"):
        llfx.rewrite(model, llfx.LoRA(r=2, target_names=("0",)), (torch.randn(2, 4),))
    assert model[1].calls == 0


class CountingNorm(nn.BatchNorm1d):
    """Counts its calls, which changes nothing that it computes, beside the numbers that it keeps in buffers."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


def test_a_count_that_nothing_follows_from_is_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), CountingNorm(4))
    gm, x = llfx.capture(model, (torch.randn(3, 4),)), torch.randn(5, 4)
    for training in (True, False):
        torch.testing.assert_close(gm.train(training)(x), model.train(training)(x))


class DrawsOnce(nn.Dropout):
    """Makes a layer that nobody runs in its first call, and draws its values, as BigBird does for a short text."""

    layer: nn.Module | None = None
    has_layer = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.has_layer:
            self.layer, self.has_layer = nn.Linear(3, 3), True
        return super().forward(input)


def test_numbers_that_the_first_call_alone_draws_are_nothing_that_it_keeps() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), DrawsOnce()), torch.randn(5, 4)
    gm = llfx.capture(model, (torch.randn(2, 4),))
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))


def test_what_is_the_same_in_each_call_is_captured() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Tabulating(4, 3)), torch.randn(5, 4)
    torch.testing.assert_close(llfx.capture(model, (torch.randn(2, 4),))(x), model(x))


def test_a_size_that_a_call_keeps_is_forgotten() -> None:
    model, x = Measuring(4, 3), torch.randn(5, 4)
    gm = llfx.capture(model, (torch.randn(2, 4), torch.randn(3)))  # copies the model anew, to leave out `scale`
    torch.testing.assert_close(gm(x, torch.ones(3)), model(x))


@pytest.mark.slow
def test_a_token_after_others_is_refused_where_states_are_kept_in_modules() -> None:
    (case,) = (case for case in cases() if case.name == "recurrent_gemma")
    adapted = llfx.adapt(case.builder()(), llfx.LoRA(r=1, target_names="linear_x")).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with pytest.raises(llfx.CaptureError, match="conv1d_state from one call for the next"):
        adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 8)
