"""Check cached values: parameter work runs once per change of a parameter, and every change is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, output
from tests.support.models import ids
from tests.support.programs import (
    PLAIN,
    Count,
    X,
    counted,
    pair,
)

aten = torch.ops.aten

PARAMETER_WORK = [
    (llfx.DoRA, aten.linalg_vector_norm.default),
    (llfx.HRA, aten.linalg_solve_triangular.default),
    (llfx.OFT, aten.index_copy.default),
]


@pytest.mark.parametrize("accumulate", [1, 8])
@pytest.mark.parametrize(("cls", "work"), PARAMETER_WORK)
def test_parameter_work_is_done_once_per_optimizer_step(cls: type[llfx.Variant], work: Any, accumulate: int) -> None:
    gm, plain = pair(cls)
    twin = copy.deepcopy(plain)
    work_counts = []
    for model in (gm.train(), twin.train()):
        optimizer = torch.optim.AdamW(llfx.adapter_parameters(model), lr=0.01)
        work_counts.append(0)
        for step in range(3):
            for batch in range(accumulate):
                with Count() as count:
                    loss = output(model, (ids(2, 5, seed=10 * step + batch),)).square().mean()
                loss.backward()
                work_counts[-1] += count.calls[work.overloadpacket.__name__]
            nn.utils.clip_grad_norm_(llfx.adapter_parameters(model), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < work_counts[0] == work_counts[1] / accumulate
    for name, tensor in llfx.adapter_state_dict(twin).items():
        close(llfx.adapter_state_dict(gm)[name], tensor, 1e-9, name)


def test_a_manual_step_that_bypasses_the_version_counters_is_noticed() -> None:
    gm, plain = pair(llfx.DoRA)
    for _ in range(2):
        output(gm, X).square().mean().backward()
        for parameter in llfx.adapter_parameters(gm):
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad)
            parameter.grad = None
        close(output(gm, X), output(plain, X), 1e-9, "output")


@pytest.mark.parametrize(("cls", "work"), [(llfx.HRA, "linalg_solve_triangular"), (llfx.DoRA, "linalg_vector_norm")])
def test_parameter_work_is_done_once_without_gradients(cls: type[llfx.Variant], work: str) -> None:
    gm, plain = pair(cls)

    def generate() -> None:
        with torch.no_grad():
            for length in range(1, 5):
                output(gm, (ids(1, length),))

    assert counted(generate)[work] > 0
    assert counted(generate)[work] == 0
    gm.eval()
    assert counted(generate)[work] > 0
    assert torch.is_grad_enabled()
    close(output(gm, X), output(plain, X), 1e-9, "output")


def set_to(factor: float) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        with torch.no_grad():
            for parameter in llfx.adapter_parameters(gm):
                parameter.mul_(factor)

    return change


def assign(gm: fx.GraphModule) -> None:
    for name, parameter in list(gm.named_parameters()):
        if parameter.requires_grad:
            path, _, leaf = name.rpartition(".")
            setattr(gm.get_submodule(path), leaf, nn.Parameter(parameter.detach() * 0.9))


class WritesData(torch.optim.Optimizer):
    """An optimizer whose writes do not change the version counters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9)


def write_data(gm: fx.GraphModule) -> None:
    for parameter in llfx.adapter_parameters(gm):
        parameter.data.mul_(0.9)
    gm.eval()


def replace_data(gm: fx.GraphModule) -> None:
    for parameter in llfx.adapter_parameters(gm):
        parameter.data = parameter.data * 0.9


CHANGES: dict[str, Callable[[fx.GraphModule], Any]] = {
    "in place": set_to(0.9),
    "load": lambda gm: llfx.load_adapter_state_dict(gm, {n: t * 0.9 for n, t in llfx.adapter_state_dict(gm).items()}),
    "load_state_dict": lambda gm: gm.load_state_dict({n: t * 0.9 for n, t in gm.state_dict().items()}),
    "assign": assign,
    "optimizer that writes data": lambda gm: WritesData(llfx.adapter_parameters(gm)).step(),
    "data, then eval()": write_data,
    "replaced data": replace_data,
    "moved and back": lambda gm: gm.to(torch.bfloat16).to(torch.float64),
    "the frozen weight": lambda gm: [t.mul_(0.9) for n, t in gm.named_parameters() if not t.requires_grad],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [llfx.DoRA, llfx.HRA])
def test_every_change_of_a_parameter_is_noticed(cls: type[llfx.Variant], change: str) -> None:
    mode: Any
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        gm, _ = pair(cls)
        with mode():
            before = output(gm, X)
        CHANGES[change](gm)
        with mode():
            after = output(gm, X)
            close(after, output(llfx.optimize(gm, PLAIN), X), 1e-9, f"output under {mode.__name__}")
        assert not torch.equal(before, after)
