"""Models that decide by values: branches of the example are asserted, and loops over what occurs go over all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.capture.asserted_decisions import decisions_on_inputs
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.conformance import randomise
from tests.support.releases import cases_by_name

CASES = cases_by_name()
CFG = llfx.LoRA(r=2, target_names=".*")


class Experts(nn.Module):
    """A mixture that runs only the experts that some token chose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(4, 4) for i in range(3)})
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weight, chosen = self.router.to(torch.float32)(x).softmax(-1).max(-1)
        mask = F.one_hot(chosen, 3).T
        total = torch.zeros_like(x)
        for index in torch.greater(mask.sum(1), 0).nonzero():
            (tokens,) = torch.where(mask[index].squeeze(0))
            if tokens.numel() == 0:
                continue
            part = self.experts[f"expert_{index[0]}"](x[tokens]) * weight[tokens, None]
            total.index_add_(0, tokens, part)
        return total.view(*ids.shape, -1)


class ReadingShapes(Experts):
    """Asks in other words whether an expert has tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        mask = F.one_hot(chosen, 3).T
        total = torch.zeros_like(x)
        for index in torch.greater(mask.sum(1), 0).nonzero():
            (tokens,) = torch.where(mask[index].squeeze(0))
            assert type(x.shape[0]) in (
                int,
                torch.SymInt,
            )  # this is known, so that a comparison is a guard of the graph
            if tokens.shape[0] == 0 or tokens.size(0) == 0:
                continue
            part = self.experts[f"expert_{index[0]}"](x[tokens]).view(tokens.numel(), 4) * weight[tokens, None]
            total.index_add_(0, tokens, part)
        return total.view(*ids.shape, -1)


class Counting(Experts):
    """Does something for each expert, whether or not it has tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor = self.embed(ids)
        for _ in F.one_hot(ids.flatten() % 3, 3).sum(0).nonzero().squeeze(-1):
            total = total + 1
        return total


class CountingBehindAGate(Counting):
    """Does what a parameter hides that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor = self.embed(ids)
        return total + self.gate * (super().forward(ids) - total)


class Averaging(Experts):
    """Skips indices without entries because their average is not a number."""

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor = self.embed(ids)
        mask = F.one_hot(ids.flatten() % 3, 3).T
        for index in mask.sum(1).nonzero():
            (tokens,) = torch.where(mask[index.item()])
            if tokens.numel() == 0:
                continue
            total = total + total.flatten(0, 1)[tokens].mean(0)
        return total


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if mask.any().item():
            y = y.masked_fill(mask[:, None], 0)
        halves: Any = torch.div(x.shape[0], 2, rounding_mode="trunc")
        return y.view(halves, 2, -1)


def _output_and_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of adapters; zeros for those of experts that no token chose."""
    model.zero_grad()
    output: Tensor = model(ids)
    output.square().sum().backward()
    parameters = list(llfx.adapter_parameters(model))
    return [output, *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)]


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(9).view(3, 3)


@pytest.mark.broad
@pytest.mark.parametrize("kind", [Experts, ReadingShapes])
def test_a_loop_over_the_experts_that_tokens_chose_is_followed_for_others(kind: type[Experts], ids: Tensor) -> None:
    model = kind()
    gm = llfx.rewrite(model, CFG, (ids,))
    randomise(gm, 0)
    wrapped = wrap_again(gm, model)
    chosen = set()
    for tokens in (ids, ids[:1, :2], torch.zeros(2, 5, dtype=torch.long), torch.full((1, 2), 8)):
        chosen.add(tuple(model.router(model.embed(tokens)).argmax(-1).unique().tolist()))
        expected, actual = (_output_and_gradients(adapted, tokens) for adapted in (wrapped, gm))
        torch.testing.assert_close(actual, expected)
    assert len(chosen) > 1


@pytest.mark.parametrize("kind", [Counting, CountingBehindAGate, Averaging])
def test_a_loop_that_works_for_each_index_that_occurs_is_refused(kind: type[Experts], ids: Tensor) -> None:
    with pytest.raises(llfx.CaptureError, match=r"loops over the indices that occur.*computes something else"):
        llfx.capture(kind(), (ids,))


def test_a_loop_of_which_nothing_shows_what_it_does_without_entries_is_refused() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for index in (x.abs().sum(1) > 0).nonzero():
                x = x + x[index]
            return x

    model = nn.Sequential(nn.Linear(4, 4), Rows())
    with pytest.raises(llfx.CaptureError, match=r"all of them do on the example inputs.*leave some out"):
        llfx.capture(model, (torch.randn(3, 4),), dynamic_shapes=None)


@pytest.mark.parametrize("masked", [True, False])
def test_a_branch_on_values_is_that_of_the_example_and_refuses_the_other(masked: bool) -> None:
    model = Branching()
    masks = torch.tensor([masked, False, False, False]), torch.tensor([not masked, False])
    gm = llfx.capture(model, {"x": torch.randn(4, 4), "mask": masks[0]})
    x = torch.randn(6, 4)
    mask = torch.cat([masks[0], masks[0][1:3]])
    for training in (True, False):
        torch.testing.assert_close(gm.train(training)(x, mask), model(x, mask))
        with pytest.raises(llfx.CallError, match=rf"captured where `if mask.any\(\).item\(\):`.*goes by {masked}"):
            gm(x[:4], torch.cat([masks[1], masks[1]]))


def test_what_a_model_decides_on_inputs_and_buffers_alone_is_known_before_the_graph_runs() -> None:
    class Clipping(nn.Linear):
        most: Tensor

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("most", torch.tensor(2.0))

        def forward(self, input: Tensor) -> Tensor:
            if (input > self.most).any():
                input = input.clamp(max=1)
            written = input.clone()
            written[0] = 9.0
            if (written > self.most).any():  # which a function of the inputs would have to write for
                written = written - 1
            y = super().forward(written)
            if (y < 1e9).all():  # which depends on weights
                return y
            return -y

    model, x = Clipping(), torch.ones(3, 4)
    gm = llfx.capture(model, (x,))
    refusal = decisions_on_inputs(gm)
    assert refusal(gm, x) == ""
    assert re.search(r"if \(input > self.most\).any\(\):.*goes by False, and is True in this call", refusal(gm, 3 * x))
    gm.get_buffer("most").fill_(4.0)
    assert refusal(gm, 3 * x) == ""
    assert len([node for node in gm.graph.nodes if "_assert_async" in str(node.target)]) == 3
    assert decisions_on_inputs(llfx.capture(nn.Linear(4, 4), (x,)))(None, x) == ""


def test_a_branch_on_a_random_number_is_refused() -> None:
    class Dropping(nn.Linear):
        chance = 0.1

        def forward(self, input: Tensor) -> Tensor:
            drawn = torch.rand([])
            return input if drawn < self.chance else super().forward(input)

    model, inputs = Dropping(4, 4), (torch.randn(3, 4),)
    with pytest.raises(llfx.CaptureError, match=r"if drawn < self.chance"):
        llfx.capture(model, inputs)
    model.chance = 0.0
    torch.testing.assert_close(llfx.capture(model, inputs)(*inputs), model(*inputs))


@pytest.mark.broad
def test_experts_of_transformers_are_one_operation_where_the_config_asks_for_a_loop() -> None:
    model = CASES["mixtral"].builder()()
    model.set_experts_implementation("eager")
    gm = llfx.capture(model)
    assert any("grouped_mm" in str(node.target) for node in gm.graph.nodes)
    assert model.config._experts_implementation == "eager"
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(gm(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_without_data_is_refused_with_the_line() -> None:
    with torch.device("meta"):
        model, inputs = Branching(), {"x": torch.randn(4, 4), "mask": torch.zeros(4, dtype=torch.bool)}
    with pytest.raises(llfx.CaptureError, match=r"if mask\.any"):
        llfx.capture(model, inputs)


class AsksMoreUntraced(Branching):
    """Asks where it is not traced what it can do without, as transformers asks of masks."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and (x > 1e9).any().item():
            return x
        return super().forward(x, mask)


def test_what_is_asked_in_no_trace_is_no_decision_of_the_graph() -> None:
    model, x = AsksMoreUntraced(), torch.randn(6, 4)
    mask = torch.tensor([True, False, True, False, False, True])
    gm = llfx.capture(model, (x, mask))
    torch.testing.assert_close(gm(x[:4], mask[:4]), model(x[:4], mask[:4]))
    with pytest.raises(llfx.CallError, match=r"mask.any\(\).item\(\).*goes by True, and is False in this call"):
        gm(x, mask & False)
