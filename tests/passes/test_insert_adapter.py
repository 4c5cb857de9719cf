"""`insert_adapter`: the subgraph of a variant around the calls of a site."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.capture.function_tracing.trace import trace
from lora_lite_fx.graph.insertion import INLET, OUTLET, insertions, is_inserted, recorded
from lora_lite_fx.graph.layers import layer_of
from lora_lite_fx.passes import (
    InsertAdapter,
)
from lora_lite_fx.passes.adaptation import fragment
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import check_rewrite_equals_wrap
from tests.support.models import Attention, GatedMLP, Net, ids
from tests.support.programs import after, count
from tests.support.selection import broad_after

aten = torch.ops.aten


def test_inserted_nodes_say_where_they_come_from_and_no_other_node_does() -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))], EXAMPLE)
    base_names = {node.name for node in llfx.capture(Down(), EXAMPLE).graph.nodes}
    for node in gm.graph.nodes:
        insertion = recorded(node)
        assert (insertion is None) == (node.name in base_names)
        if insertion is not None:
            assert insertion.site in ("fc", "proj")
            assert insertion.by == "insert_adapter"
            assert node.meta["nn_module_stack"]
    inserted: Any = insertions(gm.graph)
    assert [(i.site, i.adapter, i.position, i.fields["variant"]) for i in inserted] == [
        ("fc", 0, 0, "LoRA"),
        ("proj", 0, 0, "LoRA"),
        ("proj", 1, 1, "HRA"),
    ]
    outlet: Any = recorded(inserted[1].outlet)
    inlet: Any = recorded(inserted[2].inlet)
    assert (outlet.part, inlet.part) == (OUTLET, INLET)


def test_inserted_nodes_have_what_the_nodes_of_torch_export_have() -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.DoRA(r=2, target_names=("proj",))], EXAMPLE)
    inserted = [node for node in gm.graph.nodes if is_inserted(node)]
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Keep(gm).run(*EXAMPLE)
    for node in inserted:
        value = node.meta["val"]
        sizes = [int(size) if isinstance(size, int) else len(EXAMPLE[0]) for size in value.shape]
        assert (sizes, value.dtype) == ([*values[node].shape], values[node].dtype), node.name
    for insertion in insertions(gm.graph):
        file = rf'File ".*/variants/{insertion.variant.lower()}\.py", line \d+, in forward\n.+'
        computed = [node for node in insertion.nodes if node.op == "call_function"]
        assert len(computed) > 3
        assert all(re.fullmatch(file, node.stack_trace or "") for node in computed)


def test_an_error_at_run_time_shows_the_line_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, "Scaled", Scaled)
    gm = llfx.rewrite(Down(), Scaled(r=2, target_names=("fc",)), EXAMPLE)
    gm.get_submodule("fc").lora_g = nn.Parameter(torch.ones(5))
    with pytest.raises(RuntimeError) as caught:
        fx.Interpreter(gm).run(*EXAMPLE)
    assert "%fc_lora_g_mul" in str(caught.value)
    assert "return torch.mul(base(x), p.lora_g)  # the line of the user" in str(caught.value)


@dataclass(frozen=True)
class Scaled(llfx.Variant):
    """Scales the outputs of a site."""

    r: int = 2

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_g": llfx.ParamSpec((site.d_out,), init="ones")}

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return torch.mul(base(x), p.lora_g)  # the line of the user


def test_a_forward_that_calls_for_a_rewrite_is_not_in_the_stack_traces() -> None:
    class Caller:
        def forward(self) -> fx.GraphModule:
            return llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)

    traces = [node.stack_trace for node in Caller().forward().graph.nodes if is_inserted(node) and node.stack_trace]
    assert len(traces) == 8
    assert not any("return llfx.rewrite" in trace for trace in traces)


def test_names_say_the_site_and_the_part_and_do_not_depend_on_other_sites() -> None:
    def names(*cfg: llfx.Variant) -> list[str]:
        return [node.name for node in llfx.rewrite(Down(), list(cfg), EXAMPLE).graph.nodes if is_inserted(node)]

    of_proj = [f"proj_{part}" for part in ("lora_A", "lora_A_linear", "lora_B", "lora_B_linear", "mul", "add")]
    assert names(llfx.LoRA(r=2, target_names=("proj",))) == of_proj
    assert names(llfx.LoRA(r=2))[6:] == of_proj
    second = [f"proj_{part}" for part in ("lora_A_2", "lora_A_2_linear", "lora_B_2", "lora_B_2_linear", "mul_1")]
    assert names(*[llfx.LoRA(r=2, target_names=("proj",))] * 2)[6:] == [*second, "proj_add_1"]
    net = llfx.rewrite(Net([GatedMLP], True, False), llfx.LoRA(r=2, target_names=("up",)), (ids(2, 5),))
    assert "blocks_0_up_lora_A" in [node.name for node in net.graph.nodes]


@pytest.mark.parametrize("source", [nn.Linear, "torch.nn.modules.linear.Linear"], ids=str)
def test_inserted_nodes_are_no_part_of_the_linear_that_they_adapt(source: Any) -> None:
    """The source partitioner, which quantizers use, goes by the type of the innermost module."""
    for cfg in (llfx.LoRA(r=2), llfx.HRA(r=2)):
        gm = llfx.rewrite(Down(), cfg, EXAMPLE)
        assert [
            [node.name for node in partition.nodes]
            for partitions in get_source_partitions(gm.graph, [source, "linear"]).values()
            for partition in partitions
        ] == [["linear"], ["linear_1"]]
        assert {layer_of(node) for node in gm.graph.nodes} == {None}
    gm = llfx.rewrite(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), llfx.LoRA(r=2, target_names=("0",)), EXAMPLE)
    assert {layer_of(node) for node in gm.graph.nodes if is_inserted(node) and node.op == "call_function"} == {"0@"}


class Looking(llfx.LoRA):
    """A variant that looks at the roles of its site and at the mode."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        scale = 3.0 if "query" in base.site.roles else 1.0
        return super().forward(x, base, p) * scale + (0.5 if base.training else 0.25)


@pytest.mark.parametrize(
    ("cfg", "traces"),
    broad_after(
        2,
        [
            (llfx.LoRA(r=2, target_roles=("attention",)), 1),
            (llfx.LoRA(r=2, target_roles=("attention",), dropout=0.3), 2),
            (Looking(r=2, target_roles=("attention",)), 2 * 4),
        ],
        several=True,
    ),
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
