"""`parameter_work`: which nodes of an adapter depend on tensors of the module alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_fx.graph.parameter_work import parameter_work
from lora_lite_fx.passes import HoistParameterWork, InlineRegions, Pipeline
from tests.support.adapter_graphs import check, exported, x


def in_a_region(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        b = m.b * 2
        x = F.linear(x, m.a) * F.dropout(x, 0.0, True).mean()
    return F.linear(x, b)


def of_what_the_base_writes_to(m: Any, x: Tensor) -> Any:
    y = F.linear(x, m.a * m.weight.sum())
    m.weight.mul_(1)  # which could as well change what the next call reads
    return y


@pytest.mark.parametrize(
    ("compute", "base", "work"),
    [
        (lambda m, x: F.linear(x, m.a * 2), "", ["mul"]),
        (lambda m, x: F.linear(x, m.weight * 2 + 1), "mul", []),
        (lambda m, x: F.linear(x, m.a * x.mean()), "", []),
        (lambda m, x: F.linear(x, F.dropout(m.a, 0.5, True)), "", []),
        (of_what_the_base_writes_to, "mul_", []),
    ],
    ids=["tensors", "the base's", "input", "random", "written"],
)
def test_it_depends_on_tensors_alone(compute: Callable[..., Any], base: str, work: list[str]) -> None:
    gm = exported(compute, x(), base=base)
    assert [node.name for node in parameter_work(gm) if node.op != "get_attr"] == work
    check(gm, HoistParameterWork(), x())


def test_it_stands_in_no_region() -> None:
    gm = exported(in_a_region, x())
    Pipeline((InlineRegions(),)).run(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and "custom" not in node.meta:
            node.meta["custom"] = next(other.meta["custom"] for other in gm.graph.nodes if other.meta.get("custom"))
    assert "mul" not in {node.name.partition("_")[0] for node in parameter_work(gm)}
    check(gm, HoistParameterWork(), x())
