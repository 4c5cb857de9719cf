"""Passes and pipelines: what the runner does around each pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.errors import ConfigError
from lora_lite_fx.graph.provenance import INLET, OUTLET, insertions, recorded
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    GraphPass,
    InsertAdapter,
    MergeAdapters,
    PassError,
    Pipeline,
    RemoveAdapters,
)
from lora_lite_fx.passes.adapt import insert_adapter as insert_pass
from lora_lite_fx.rewriting.base_graph import base_graph
from tests.support.conformance import check_rewrite_equals_wrap
from tests.support.models import Attention, GatedMLP, Net, ids


class Down(nn.Module):
    """The smallest block with a down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(torch.relu(self.fc(x)))


EXAMPLE = (torch.randn(2, 4),)


def test_inserted_nodes_say_where_they_come_from_and_no_other_node_does() -> None:
    gm = llfx.rewrite(Down(), [llfx.LoRA(r=2), llfx.HRA(r=2, target_names=("proj",))], EXAMPLE)
    base_names = {node.name for node in base_graph(Down(), EXAMPLE).graph.nodes}
    for node in gm.graph.nodes:
        provenance = recorded(node)
        assert (provenance is None) == (node.name in base_names)
        if provenance is not None:
            assert provenance.site in ("fc", "proj")
            assert provenance.by == "insert_adapter"
            assert node.meta["nn_module_stack"]
    found = insertions(gm.graph)
    assert [(i.site, i.adapter, i.position, i.config["variant"]) for i in found] == [
        ("fc", 0, 0, "LoRA"),
        ("proj", 0, 0, "LoRA"),
        ("proj", 1, 1, "HRA"),
    ]
    assert (recorded(found[1].outlet).part, recorded(found[2].inlet).part) == (OUTLET, INLET)


def test_passes_make_no_edit_the_second_time() -> None:
    gm = base_graph(Net([GatedMLP], True, False), (ids(2, 5),))
    insert = Pipeline((InsertAdapter(llfx.LoRA(r=2), 0, ("blocks.0.up", "head")),))
    assert [report.edits for report in insert.run(gm)] == [2]
    before = str(gm.graph)
    assert [report.edits for report in insert.run(gm)] == [0]
    assert str(gm.graph) == before
    assert [report.edits for report in Pipeline((RemoveAdapters(), RemoveAdapters(), MergeAdapters())).run(gm)] == [
        2,
        0,
        0,
    ]


def test_reports_name_the_pass_and_its_time() -> None:
    (report,) = Pipeline((RemoveAdapters(),)).run(base_graph(Down(), EXAMPLE))
    assert (report.name, report.edits) == ("remove_adapters", 0)
    assert report.seconds >= 0


def test_a_pipeline_can_go_without_a_pass() -> None:
    pipeline = Pipeline((RemoveAdapters(), MergeAdapters()))
    assert [p.name for p in pipeline.without("remove_adapters")] == ["merge_adapters"]
    with pytest.raises(ValueError, match="No pass is named fuse"):
        pipeline.without("fuse")


@dataclass(frozen=True)
class Fail(GraphPass):
    """Fails as it is told to."""

    error: Exception

    def run(self, gm: fx.GraphModule) -> int:
        raise self.error


def test_an_unexpected_failure_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError, match=r"KeyError in pass fail \(passes that ran before: remove_adapters\)"):
        Pipeline((RemoveAdapters(), Fail(KeyError("x")))).run(base_graph(Down(), EXAMPLE))


def test_a_refusal_keeps_its_class_and_notes_the_pass() -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline((Fail(ConfigError("no")),)).run(base_graph(Down(), EXAMPLE))
    assert "in pass fail" in caught.value.__notes__[0]


def test_graph_text_is_dumped_before_and_after_each_pass_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_LITE_FX_DUMP", str(tmp_path / "dump"))
    llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)(*EXAMPLE)  # the call derives what runs
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name.split("_", 1)[1] for f in files] == [
        f"{name}.{when}.txt"
        for name in (
            *("inline_regions", "drop_metadata_asserts", "inline_regions", "drop_metadata_asserts"),
            *("follow_mode", "insert_adapter"),
            *(each.name for each in OPTIMIZATIONS.of("training")),
        )
        for when in ("after", "before")
    ]
    after, before = (file.read_text() for file in files if "insert_adapter" in file.name)
    assert "lora_A" in after
    assert "lora_A" not in before


# Traces.


class Looking(llfx.LoRA):
    """Looks at what its site does and at the mode."""

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
def test_sites_of_one_size_take_further_traces_only_where_a_variant_looks_at_them_or_at_the_mode(
    cfg: llfx.Variant, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTRY, "Looking", Looking)
    made: list[fx.Graph] = []
    trace = insert_pass.trace
    monkeypatch.setattr(insert_pass, "trace", lambda *args: made.append(trace(*args)) or made[-1])
    model = Net([Attention], bias=True, tied=False).double().eval()
    gm = llfx.rewrite(model, cfg, (ids(2, 5),))
    assert len(made) == traces
    check_rewrite_equals_wrap(model, gm, llfx.wrap(model, cfg), (ids(3, 4),), 1e-10, seed=0)
