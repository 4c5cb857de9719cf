"""`scale_adapters`: a branch is multiplied, anything else is interpolated with the output without it."""

from __future__ import annotations

import torch

import lora_lite_fx as llfx
from lora_lite_fx.passes import ScaleAdapters
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import randomise
from tests.support.programs import after, count

aten = torch.ops.aten


def test_a_branch_is_multiplied() -> None:
    gm = llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)
    scaled, report = after(gm, ScaleAdapters({"default": 0.5}))
    assert report.edits == 2
    assert count(scaled, aten.mul.Tensor) == count(gm, aten.mul.Tensor) + 2
    assert count(scaled, aten.lerp.Scalar) == 0


def test_an_adapter_at_the_input_is_interpolated_with_a_second_product() -> None:
    gm = llfx.rewrite(Down(), llfx.HRA(r=2, target_names=("proj",)), EXAMPLE)
    randomise(gm, 1)
    scaled, report = after(gm, ScaleAdapters({"default": torch.ones(())}))
    assert report.edits == 1
    assert count(scaled, aten.lerp.Tensor) == 1
    assert count(scaled, aten.linear.default) == count(gm, aten.linear.default) + 1
    assert [node.name for node in scaled.graph.find_nodes(op="placeholder")][-1] == "scale_default"


def test_adapters_without_a_coefficient_stay() -> None:
    gm = llfx.rewrite(Down(), {"fr": llfx.LoRA(r=2), "de": llfx.IA3()}, EXAMPLE)
    scaled, report = after(gm, ScaleAdapters({"it": 0.5}))
    assert report.edits == 0
    assert str(scaled.graph) == str(gm.graph)
