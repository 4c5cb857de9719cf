"""Check that parameters near zero, and inputs of one number, hide nothing of a model when its graph is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.comparable import revealed, varied
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.support.untouched import untouched

X, CONDITION = torch.rand(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


class Gated(nn.Module):
    """Two linears, and between them a branch whose last layer starts at zero, as that of a condition does."""

    def __init__(self, branch: Callable[[Any, Tensor, Tensor | None], Tensor], start: float = 0.0) -> None:
        super().__init__()
        self.first, self.gate, self.last = (nn.Linear(8, 8) for _ in range(3))
        for parameter in self.gate.parameters():
            nn.init.constant_(parameter, start)
        self.scale = nn.Parameter(torch.full((8,), start))
        self.kept = nn.Buffer(torch.full((8,), start))
        self.branch = branch

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        y = self.first(x)
        result: Tensor = self.last((y + self.branch(self, y, condition)).tanh())
        return result


def conditioned(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return 0 if condition is None else m.gate(condition)


def scaled(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return 0 if condition is None else m.scale * (1 + condition)


def scaled_by_a_buffer(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return 0 if condition is None else m.kept * (1 + condition)


def otherwise_while_traced(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.gate(2 * y if torch.compiler.is_compiling() else y)


def otherwise_for_one_row(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.gate(y if y.shape[0] == 1 else 2 * y)


def decides_by_the_gate(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.scale * y.sin() if m.scale[0] > 0.1 else 0


def film(m: Any, x: Tensor, condition: Tensor | None) -> Tensor:
    return m.last(x if condition is None else x * (1 + m.first(condition)))  # type: ignore[no-any-return]


def other_product_while_traced(m: Any, x: Tensor, condition: Tensor | None) -> Tensor:
    return m.last(2 * x if torch.compiler.is_compiling() else x)  # type: ignore[no-any-return]


def other_product_for_one_row(m: Any, x: Tensor, condition: Tensor | None) -> Tensor:
    return m.last(x if x.shape[0] == 1 else 2 * x)  # type: ignore[no-any-return]


def only_zeros_and_ones(m: Any, x: Tensor, condition: Tensor | None) -> Tensor:
    if ((x != 0) & (x != 1)).any():
        raise ValueError("zeros and ones alone")
    return m.last(x if condition is None else x * condition)  # type: ignore[no-any-return]


class Whole(nn.Module):
    """Two linears in a function."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.function(self, x, condition)


def both(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
    cfg = llfx.LoRA(r=2, target_names=".")
    with untouched(model):
        gm, wrapped = llfx.rewrite(model, cfg, dict(inputs)), llfx.wrap(model, cfg, dict(inputs))
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    return gm, wrapped


@pytest.mark.parametrize("start", broad_after(1, [1e-6, 0.0]))
@pytest.mark.parametrize("branch", [conditioned, scaled, scaled_by_a_buffer])
def test_a_condition_whose_gate_starts_near_zero_may_not_be_left_out(branch: Any, start: float) -> None:
    gm, wrapped = both(Gated(branch, start).double(), {"x": X, "condition": CONDITION})
    close(gm(X, CONDITION), wrapped(X, CONDITION), 1e-9, "output")
    with pytest.raises(llfx.CallError, match="condition cannot be left out"):
        gm(X)


def test_a_branch_that_a_trace_changes_is_seen_behind_a_gate() -> None:
    with pytest.raises(llfx.CaptureError, match="first module whose output differs is gate"):
        both(Gated(otherwise_while_traced).double(), {"x": X})


def test_a_size_of_one_that_decides_is_seen_behind_a_gate() -> None:
    gm, wrapped = both(Gated(otherwise_for_one_row).double(), {"x": X})
    close(gm(X), wrapped(X), 1e-9, "output")
    with pytest.raises(llfx.CallError, match=r"x.shape\[0\] != 1"):
        gm(X[:1])


def test_a_model_that_decides_by_a_parameter_is_compared_as_it_is() -> None:
    gm, wrapped = both(Gated(decides_by_the_gate).double(), {"x": X})
    close(gm(X), wrapped(X), 1e-9, "output")


def test_parameters_over_one_storage_get_the_same_values_and_their_own_afterwards() -> None:
    linear, other = nn.Linear(4, 3), nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    other.weight = nn.Parameter(linear.weight.detach())
    linear.bias.data[0] = other.bias.data[0] = 0  # one value says nothing of the others
    biases = linear.bias.clone(), other.bias.clone()
    with revealed(linear, other):
        assert linear.weight.abs().mean() > 0.1
        assert torch.equal(linear.weight, other.weight)
        assert torch.equal(linear.bias, biases[0])
        assert torch.equal(other.bias, biases[1])
    assert not linear.weight.any()
    assert linear.weight.data_ptr() == other.weight.data_ptr()


def test_copies_of_buffers_get_the_same_values_by_their_names() -> None:
    model, graph = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    means = [each.get_buffer("0.running_mean") for each in (model, graph)]
    with revealed(model, graph):
        assert means[0].abs().mean() > 0.1
        assert torch.equal(*means)
    assert not any(mean.any() for mean in means)


ZEROS, ONES = torch.zeros_like(X), torch.ones_like(X)


@pytest.mark.parametrize("condition", broad_after(1, [ZEROS, ONES]))
def test_a_condition_that_inputs_of_zeros_hide_may_not_be_left_out(condition: Tensor) -> None:
    gm, wrapped = both(Whole(film).double(), {"x": ZEROS, "condition": condition})
    close(gm(X, CONDITION), wrapped(X, CONDITION), 1e-9, "output")
    with pytest.raises(llfx.CallError, match="condition cannot be left out"):
        gm(X)


def test_a_product_that_a_trace_changes_is_seen_behind_inputs_of_zeros() -> None:
    with pytest.raises(llfx.CaptureError, match="inputs in evaluation with other numbers in them: result by"):
        both(Whole(other_product_while_traced).double(), {"x": ZEROS})


def test_a_size_of_one_that_decides_is_seen_behind_inputs_of_zeros() -> None:
    gm, wrapped = both(Whole(other_product_for_one_row).double(), {"x": ZEROS})
    close(gm(X), wrapped(X), 1e-9, "output")
    with pytest.raises(llfx.CallError, match=r"x.shape\[0\] != 1"):
        gm(X[:1])


def test_a_model_that_takes_no_other_numbers_is_compared_on_its_own() -> None:
    gm, wrapped = both(Whole(only_zeros_and_ones).double(), {"x": ONES, "condition": ZEROS})
    close(gm(ONES, CONDITION), wrapped(ONES, CONDITION), 1e-9, "output")
    close(gm(ONES), wrapped(ONES), 1e-9, "output without a condition")


class Attends(nn.Module):
    """Attention to the tokens of a mask; without one, to those before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.first(self.embed(ids))
        scores = y @ y.mT
        seen = torch.ones_like(scores).tril() if mask is None else mask[:, None]
        result: Tensor = self.last(scores.masked_fill(seen == 0, -1e9).softmax(-1) @ y)
        return result


@pytest.mark.parametrize("token", broad_after(1, [0, 2]))
def test_a_mask_that_tokens_of_one_kind_hide_may_not_be_left_out(token: int) -> None:
    ids = torch.full((2, 5), token)
    gm, wrapped = both(Attends().double(), {"ids": ids, "mask": torch.ones_like(ids)})
    others = torch.arange(10).view(2, 5) % 3
    close(gm(others, torch.ones_like(ids)), wrapped(others, torch.ones_like(ids)), 1e-9, "output")
    with pytest.raises(llfx.CallError, match="mask cannot be left out"):
        gm(others)


def test_inputs_vary_where_they_are_one_number() -> None:
    whole, scalar = torch.ones(3, dtype=torch.long), torch.tensor(2.0)
    args, kwargs = varied(((ZEROS, whole), {"x": X, "scalar": scalar, "name": "name", "other": ONES}))
    assert args[0].unique().numel() == X.numel()
    assert not torch.equal(args[0], kwargs["other"])
    assert args[1] is whole
    assert kwargs["x"] is X
    assert kwargs["scalar"] is scalar
    assert varied(((X, whole), {"name": None})) is None


def test_tokens_vary_among_those_that_a_model_surely_has() -> None:
    ids, labels = torch.full((4, 9), 5), torch.full((4, 9), -100)
    inputs = varied({"ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, of_tokens=True)
    assert inputs["ids"].min() >= 0
    assert inputs["ids"].max() <= 5
    assert inputs["ids"].unique().numel() > 2
    assert inputs["attention_mask"].all()
    assert inputs["labels"] is labels
