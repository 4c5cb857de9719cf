"""Writes in place: they are seen in operators, in modules, and in the functions and methods of a symbolic trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_lite_fx.graph.writes import may_return_a_view, overwrites, written, written_buffers

aten = torch.ops.aten


class Computes(nn.Module):
    """Computes a function of itself and its input."""

    mean: Tensor

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def exported(compute: Callable[..., Any]) -> fx.GraphModule:
    gm: Any = torch.export.export(Computes(compute), (torch.ones(3, 4),)).module()
    assert isinstance(gm, fx.GraphModule)
    return gm


def traced(compute: Callable[..., Any]) -> fx.GraphModule:
    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True

    model = Computes(compute)
    return fx.GraphModule(model, Tracer().trace(model))


Capture = Callable[[Callable[..., Any]], fx.GraphModule]
CASES: list[tuple[Capture, Callable[..., Any], bool]] = [
    (exported, lambda m, x: (x + 1).mul_(2), True),
    (exported, lambda m, x: (x + 1).mul(2), False),
    (traced, lambda m, x: (x + 1).mul_(2), True),
    (traced, lambda m, x: (x + 1).mul(2), False),
    (traced, lambda m, x: torch.relu_(x + 1), True),
    (traced, lambda m, x: F.relu(x + 1, inplace=True), True),
    (traced, lambda m, x: F.relu(x + 1, True), True),
    (traced, lambda m, x: F.relu(x + 1), False),
    (traced, lambda m, x: m.relu(x + 1), True),
    (traced, lambda m, x: m.norm(x + 1), False),
    (traced, lambda m, x: x.mul_(2), False),  # an input, which the caller sees
]


@pytest.mark.parametrize(("capture", "compute", "expected"), CASES)
def test_a_write_is_seen(capture: Capture, compute: Callable[..., Any], expected: bool) -> None:
    gm = capture(compute)
    assert overwrites(gm) is expected
    if expected:
        (operand,) = [operand for node in gm.graph.nodes for operand in written(gm, node)]
        assert operand.target in (aten.add.Tensor, torch.add) or "add" in operand.name


def of_batch_norm(m: Any, x: Tensor) -> Any:
    return F.batch_norm(x, m.mean, m.var, training=True)


@pytest.mark.parametrize(
    ("capture", "compute", "names"),
    [
        (exported, lambda m, x: x + m.mean.add_(1), ["mean"]),
        (exported, of_batch_norm, ["mean", "var"]),
        (traced, of_batch_norm, ["mean", "var"]),
        (traced, lambda m, x: x + m.mean.add_(1), ["mean"]),
        (traced, lambda m, x: x + torch.add(m.mean, 1, out=m.var), ["var"]),
        (traced, lambda m, x: x + torch.frexp(m.mean, out=(m.var, m.mean))[0], ["var", "mean"]),
        (traced, lambda m, x: m.norm(x), ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]),
        (exported, lambda m, x: x + m.mean, []),
    ],
    ids=["exported", "exported statistics", "traced statistics", "traced", "out", "two out", "module", "read"],
)
def test_written_buffers_are_known(capture: Capture, compute: Callable[..., Any], names: list[str]) -> None:
    assert written_buffers(capture(compute)) == names


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.view.default, True),
        (aten.neg.default, False),
        (aten.dropout.default, True),
        (aten.type_as.default, True),
        (torch.relu, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_may_be_a_view_is_known(target: Any, expected: bool) -> None:
    graph = fx.Graph()
    assert may_return_a_view(graph.call_function(target, (graph.placeholder("x"),))) is expected
