"""`insert_adapter`: the subgraph of a variant around the calls of a site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.capture.tracing import trace
from lora_lite_fx.graph.provenance import INLET, OUTLET, insertions, recorded
from lora_lite_fx.passes import (
    InsertAdapter,
)
from lora_lite_fx.passes.adapt import fragment
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import check_rewrite_equals_wrap
from tests.support.models import Attention, Net, ids
from tests.support.programs import (
    after,
    count,
)

aten = torch.ops.aten


def test_inserted_nodes_say_where_they_come_from_and_no_other_node_does() -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))], EXAMPLE)
    base_names = {node.name for node in llfx.capture(Down(), EXAMPLE).graph.nodes}
    for node in gm.graph.nodes:
        provenance = recorded(node)
        assert (provenance is None) == (node.name in base_names)
        if provenance is not None:
            assert provenance.site in ("fc", "proj")
            assert provenance.by == "insert_adapter"
            assert node.meta["nn_module_stack"]
    inserted: Any = insertions(gm.graph)
    assert [(i.site, i.adapter, i.position, i.config["variant"]) for i in inserted] == [
        ("fc", 0, 0, "LoRA"),
        ("proj", 0, 0, "LoRA"),
        ("proj", 1, 1, "HRA"),
    ]
    outlet: Any = recorded(inserted[1].outlet)
    inlet: Any = recorded(inserted[2].inlet)
    assert (outlet.part, inlet.part) == (OUTLET, INLET)


class Looking(llfx.LoRA):
    """A variant that looks at the roles of its site and at the mode."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        scale = 3.0 if "query" in base.site.roles else 1.0
        return super().forward(x, base, p) * scale + (0.5 if base.training else 0.25)


@pytest.mark.parametrize(
    ("cfg", "traces"),
    [
        (llfx.LoRA(r=2, target_roles=("attention",)), 1),
        (llfx.LoRA(r=2, target_roles=("attention",), dropout=0.3), 2),
        (Looking(r=2, target_roles=("attention",)), 2 * 4),
    ],
    ids=["neither", "mode", "both"],
)
def test_sites_of_one_size_share_a_trace_unless_the_variant_looks_at_the_site_or_the_mode(
    cfg: llfx.Variant, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, "Looking", Looking)
    made: list[fx.Graph] = []

    def trace_and_keep(*args: Any) -> fx.Graph:
        made.append(trace(*args))
        return made[-1]

    monkeypatch.setattr(fragment, "trace", trace_and_keep)
    model = Net([Attention], bias=True, tied=False).double().eval()
    gm = llfx.rewrite(model, cfg, (ids(2, 5),))
    assert len(made) == traces
    check_rewrite_equals_wrap(model, gm, llfx.wrap(model, cfg), (ids(3, 4),), 1e-10, seed=0)


def test_a_branch_is_added_and_the_site_stays() -> None:
    gm = llfx.capture(Down(), EXAMPLE)
    before = {node.name: str(node.args) for node in gm.graph.nodes if node.name in ("linear", "linear_1", "relu")}
    inserted, report = after(gm, InsertAdapter(llfx.LoRA(r=2), 0, ("proj",)))
    assert report.edits == 1
    assert (count(gm, aten.linear.default), count(inserted, aten.linear.default)) == (2, 4)
    assert (count(gm, aten.add.Tensor), count(inserted, aten.add.Tensor)) == (1, 2)
    assert {node.name: str(node.args) for node in inserted.graph.nodes if node.name in before} == before
