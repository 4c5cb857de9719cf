"""`merge_adapters`: the adapters are folded into tensors of the graph's own."""

from __future__ import annotations

import torch

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    MergeAdapters,
)
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import randomise
from tests.support.programs import (
    after,
)

aten = torch.ops.aten


def test_the_graph_is_the_base_with_other_weights() -> None:
    model = Down()
    base = llfx.capture(model, EXAMPLE)
    gm = llfx.rewrite(base, [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))])
    randomise(gm, 1)
    merged, report = after(gm, MergeAdapters())
    assert report.edits == 2
    assert str(merged.graph) == str(base.graph)
    torch.testing.assert_close(merged(*EXAMPLE), gm(*EXAMPLE).detach(), rtol=1e-4, atol=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, gm.get_parameter(name)), "the model's own weights stay"
        assert name.endswith("bias") or not torch.equal(weight, merged.get_parameter(name))
