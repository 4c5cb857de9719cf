"""Check that parameters near zero hide nothing of a model when its graph is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.revealed_parameters import revealed_parameters
from tests.support.conformance import close, randomise
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
        self.branch = branch

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        y = self.first(x)
        result: Tensor = self.last((y + self.branch(self, y, condition)).tanh())
        return result


def conditioned(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return 0 if condition is None else m.gate(condition)


def scaled(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return 0 if condition is None else m.scale * (1 + condition)


def otherwise_while_traced(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.gate(2 * y if torch.compiler.is_compiling() else y)


def otherwise_for_one_row(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.gate(y if y.shape[0] == 1 else 2 * y)


def decides_by_the_gate(m: Any, y: Tensor, condition: Tensor | None) -> Any:
    return m.scale * y.sin() if m.scale[0] > 0.1 else 0


def both(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
    cfg = llfx.LoRA(r=2, target_names=".")
    with untouched(model):
        gm, wrapped = llfx.rewrite(model, cfg, dict(inputs)), llfx.wrap(model, cfg, dict(inputs))
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    return gm, wrapped


@pytest.mark.parametrize("start", [0.0, 1e-6])
@pytest.mark.parametrize("branch", [conditioned, scaled])
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
    other.bias.data[0] = 0  # one value says nothing of the others
    bias = other.bias.clone()
    with revealed_parameters(linear, other):
        assert linear.weight.abs().min() > 0.1
        assert torch.equal(linear.weight, other.weight)
        assert torch.equal(other.bias, bias)
    assert not linear.weight.any()
    assert linear.weight.data_ptr() == other.weight.data_ptr()
