"""Check that a run without data records the same, whether operators are asked anew or are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lite_fx.capture.depth import known_operators
from lora_lite_fx.capture.depth.known_operators import KnownOperators
from lora_lite_fx.capture.depth.operators import Run, StandIn
from lora_lite_fx.capture.depth.stacks import stacks_of
from lora_lite_fx.compat.torch import tensors_without_data
from tests.support.stacks import Stack


class Layer(nn.Module):
    """Calls operators of one kind on a tensor of shape (4, 6), and more on what they return."""

    def __init__(self, calls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return self.calls(x)


def in_place(x: Tensor) -> Tensor:
    x = (x * 2).unsqueeze_(0).squeeze_(0)
    return x.add_(1).t_().contiguous().t_()


def strided_views(x: Tensor) -> Tensor:
    part = (x + 1)[1:, 2:]
    return part.as_strided((4, 6), (6, 1), 0) + part.transpose(0, 1).as_strided((4, 6), (6, 1), 0)


def conjugates(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(4, 3, 2))
    return torch.view_as_real(pairs.conj().resolve_conj()).reshape(4, 6) + torch.imag(pairs.conj()).sum()


def numbers(x: Tensor) -> Tensor:
    two = torch.tensor(2.0) * torch.tensor(1.0)
    return x * two.item() if two.item() > 1 else x


def sizes_of_values(x: Tensor) -> Tensor:
    some = x[x.sum(1) > 0]
    return x + some.sum() + some.as_strided((2, 6), (6, 1)).sum() + x.nonzero().size(1)


def default_dtypes(x: Tensor) -> Tensor:
    whole = x.to(torch.int64)
    half = whole / 2
    torch.set_default_dtype(torch.float64)
    try:
        return x + half + whole / 2
    finally:
        torch.set_default_dtype(torch.float32)


def several_results(x: Tensor) -> Tensor:
    one, other = x.split(3, dim=1)
    values, order = torch.cat([other, one], 1).sort()
    return values * order


def writes_to_one_of_two(x: Tensor) -> Tensor:
    one, other = x * 2, x * 2
    one.add_(1)
    return one + other


def inside_vmap(x: Tensor) -> Tensor:
    kept = x > 0
    columns = torch.vmap(lambda column: torch.cat([kept[:, 0], kept[0, :2]]) & (column > 0), out_dims=1)
    rows = torch.vmap(lambda row: kept.view(4, 6)[0].clone())
    seen: Tensor = columns(torch.arange(6))[:4] & rows(torch.arange(4))
    return x * seen


CALLS = (
    in_place, strided_views, conjugates, numbers, sizes_of_values, default_dtypes, several_results, inside_vmap,
    writes_to_one_of_two,
)  # fmt: skip


def records(model: nn.Module, call: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Run], list[Run]]:
    """Two runs in each mode, with operators known from run to run; and the same with each operator asked anew."""

    def runs() -> list[Run]:
        stand_in = StandIn(model, stacks_of(model), KnownOperators())
        found = []
        for training in (True, True, False, False):
            stand_in.model.train(training)
            found.append(stand_in.run(call))
        return found

    known = runs()

    monkeypatch.setattr(known_operators, "_follows_from_looks", lambda operator, result: False)
    return known, runs()


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: str(calls.__name__))
def test_a_run_of_known_operators_records_the_same(
    calls: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(Layer(calls) for _ in range(4)))
    known, asked = records(model, ((torch.randn(4, 6),), {}), monkeypatch)
    assert known[0].steps, "nothing was recorded"
    for run, other in zip(known, asked, strict=True):
        assert [step for step in run.steps if step not in other.steps] == []
        assert run == other


def test_operators_are_asked_once_for_all_layers_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[Tensor] = []

    def learn(like: Tensor) -> Any:
        learned.append(like)
        return tensors_without_data(like)

    monkeypatch.setattr(known_operators, "tensors_without_data", learn)

    def counts(layers: int) -> list[int]:
        known = KnownOperators()
        found: list[int] = []
        for training in (True, False):
            stand_in = StandIn(Stack(layers=layers).train(training), {"layers": layers}, known)
            stand_in.run(((torch.randn(3, 4),), {}), dropouts=[])
            found.append(len(learned) - sum(found))
        learned.clear()
        return found

    few, many = counts(3), counts(9)
    assert few == many
    assert few[0] > 5
    assert few[1] == 0
