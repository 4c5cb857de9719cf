"""`leave_out_adapters`: adapters that do not act are not in the program, and their tensors stay."""

from __future__ import annotations

import torch

import lora_lite_fx as llfx
from lora_lite_fx.passes import LeaveOutAdapters
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.programs import after, count

aten = torch.ops.aten


def test_the_graph_is_that_of_the_adapters_that_act() -> None:
    base = llfx.capture(Down(), EXAMPLE)
    gm = llfx.rewrite(base, {"fr": llfx.LoRA(r=2), "de": llfx.HRA(r=2, target_names=("proj",))})
    alone = llfx.rewrite(base, {"fr": llfx.LoRA(r=2)})
    without, report = after(gm, LeaveOutAdapters(("fr",)))
    assert report.edits == 1
    assert [node.target for node in without.graph.nodes] == [node.target for node in alone.graph.nodes]
    assert without.state_dict().keys() == gm.state_dict().keys()
    plain, report = after(gm, LeaveOutAdapters(()))
    assert report.edits == 3
    assert str(plain.graph) == str(base.graph)
    assert count(plain, aten.linear.default) == 2
