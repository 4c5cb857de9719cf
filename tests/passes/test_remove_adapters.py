"""`remove_adapters`: the base graph comes back, node for node."""

from __future__ import annotations

import torch

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    RemoveAdapters,
)
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.programs import (
    after,
    count,
)

aten = torch.ops.aten


def test_the_graph_and_the_tensors_are_as_before() -> None:
    base = llfx.capture(Down(), EXAMPLE)
    gm = llfx.rewrite(base, [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))])
    removed, report = after(gm, RemoveAdapters())
    assert report.edits == 3
    assert str(removed.graph) == str(base.graph)
    assert count(gm, aten.linear.default) > count(removed, aten.linear.default) == 2
    assert removed.state_dict().keys() == base.state_dict().keys()
