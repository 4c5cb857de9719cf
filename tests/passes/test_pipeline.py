"""Passes and pipelines: what the runner does around each pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.errors import ConfigError
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    Declined,
    GraphPass,
    InsertAdapter,
    MergeAdapters,
    Outcome,
    PassError,
    Pipeline,
    RemoveAdapters,
    pipeline,
)
from lora_lite_fx.passes.pipeline import is_of_others
from tests.support.models import GatedMLP, Net, ids


class Down(nn.Module):
    """The smallest block with a down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.proj(torch.relu(self.fc(x)))


EXAMPLE = (torch.randn(2, 4),)


def test_passes_make_no_edit_the_second_time() -> None:
    gm = llfx.capture(Net([GatedMLP], True, False), (ids(2, 5),))
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
    (report,) = Pipeline((RemoveAdapters(),)).run(llfx.capture(Down(), EXAMPLE))
    assert (report.name, report.edits) == ("remove_adapters", 0)
    assert report.seconds >= 0


def test_a_pipeline_can_go_without_a_pass() -> None:
    pipeline = Pipeline((RemoveAdapters(), MergeAdapters()))
    assert [p.name for p in pipeline.without("remove_adapters")] == ["merge_adapters"]
    with pytest.raises(ValueError, match="No pass is named fuse"):
        pipeline.without("fuse")


@dataclass(frozen=True)
class Fail(GraphPass):
    """A pass that raises `error`."""

    error: Exception

    def run(self, gm: fx.GraphModule) -> int:
        raise self.error


def test_an_unexpected_failure_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError, match=r"KeyError in pass fail \(passes that ran before: remove_adapters\)"):
        Pipeline((RemoveAdapters(), Fail(KeyError("x")))).run(llfx.capture(Down(), EXAMPLE))


def test_a_refusal_keeps_its_class_and_notes_the_pass() -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline((Fail(ConfigError("no")),)).run(llfx.capture(Down(), EXAMPLE))
    assert "in pass fail" in caught.value.__notes__[0]


@dataclass(frozen=True)
class MovesForward(GraphPass):
    """Moves a node before what it reads."""

    def run(self, gm: fx.GraphModule) -> int:
        linear = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
        next(iter(gm.graph.nodes)).prepend(linear)
        return 1


@pytest.mark.parametrize("of_others", [False, True])
def test_a_graph_that_reads_a_value_too_early_is_an_error(of_others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of others is named; those of this library are linted together, in its tests alone one by one."""
    monkeypatch.setattr(pipeline, "is_of_others", lambda graph_pass: of_others)
    where = r"in pass moves_forward \(.*\)" if of_others else "after the passes moves_forward, remove_adapters"
    with pytest.raises(PassError, match=f"RuntimeError {where}: Argument 'x' of Node 'linear' was used before"):
        Pipeline((MovesForward(), RemoveAdapters())).run(llfx.capture(Down(), EXAMPLE))


def test_passes_of_others_are_told_from_those_of_this_library() -> None:
    assert [is_of_others(each) for each in (MovesForward(), RemoveAdapters())] == [True, False]


@dataclass(frozen=True)
class Returns(GraphPass):
    """Returns a value and changes nothing."""

    value: Any

    def run(self, gm: fx.GraphModule) -> Any:
        return self.value


@pytest.mark.parametrize("value", [None, 1.0, Outcome("two")], ids=str)  # type: ignore[arg-type]
def test_a_pass_that_returns_no_number_of_edits_is_named(value: object) -> None:
    with pytest.raises(PassError, match=r"TypeError in pass returns \(.*: none\): run must return the number of edits"):
        Pipeline((Returns(value),)).run(llfx.capture(Down(), EXAMPLE))


def test_reports_have_the_reasons_of_a_pass_each_once() -> None:
    gm = llfx.rewrite(Down(), llfx.LoRA(r=2, target_names=("proj",)), EXAMPLE)
    nodes = {node.name: node for node in gm.graph.nodes}
    assert Declined.at([nodes["proj_lora_A_linear"], nodes["proj_add"]], "no") == Declined(("proj",), "no")
    assert str(Declined.at([nodes["linear"], nodes["proj_add"]], "no")) == "fc, proj: no"
    assert str(Declined((), "no")) == "no"
    declined = (Declined(("proj",), "no"), Declined(("fc",), "no"), Declined(("proj",), "no"))
    reports = Pipeline((Returns(Outcome(0, declined)), Returns(3))).run(gm)
    assert [(report.edits, report.declined) for report in reports] == [(0, declined[:2]), (3, ())]


# Passes at a chosen place.


def names(pipeline: Pipeline) -> list[str]:
    return [graph_pass.name for graph_pass in pipeline]


def test_passes_of_ones_own_stand_where_one_says() -> None:
    own, other = Returns(1), Fail(KeyError("x"))
    pipeline = Pipeline((RemoveAdapters(), MergeAdapters()), check=EXAMPLE)
    assert names(pipeline.before("remove_adapters", own, other)) == ["returns", "fail", *names(pipeline)]
    assert names(pipeline.before("merge_adapters", own)) == ["remove_adapters", "returns", "merge_adapters"]
    assert names(pipeline.after("merge_adapters", own, other)) == [*names(pipeline), "returns", "fail"]
    assert names(pipeline.after("remove_adapters")) == names(pipeline)
    twice = Pipeline((own, RemoveAdapters(), own))
    assert names(twice.before("returns", other)) == ["fail", "returns", "remove_adapters", "returns"]
    assert names(twice.after("returns", other)) == ["returns", "remove_adapters", "returns", "fail"]
    for made in (pipeline.before("merge_adapters", own), pipeline.without("merge_adapters"), pipeline.of("training")):
        assert made.check is EXAMPLE
    assert names(pipeline) == ["remove_adapters", "merge_adapters"]


def test_a_pass_of_ones_own_runs_in_the_programs_that_it_names() -> None:
    gm = llfx.rewrite(Down(), llfx.LoRA(r=2), EXAMPLE)
    passes = OPTIMIZATIONS.before("gather_products", ForTraining())
    optimized = llfx.optimize(gm, passes)
    reports = llfx.program(optimized, "training").meta["report"].passes
    assert [each.name for each in reports if each.name in ("for_training", "gather_products")] == [
        "for_training",
        "gather_products",
    ]
    assert "for_training" not in [each.name for each in llfx.program(optimized).meta["report"].passes]


@dataclass(frozen=True)
class ForTraining(GraphPass):
    """Does nothing, in the training program."""

    programs = frozenset({"training"})

    def run(self, gm: fx.GraphModule) -> int:
        return 0


def no_pass(gm: fx.GraphModule) -> int:
    return 0


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "name": (
        lambda: OPTIMIZATIONS.before("gather_product", Returns(0)),
        f"No pass is named gather_product; the pipeline has {', '.join(names(OPTIMIZATIONS))}.",
    ),
    "name in an empty pipeline": (
        lambda: Pipeline(()).after("gather_products", Returns(0)),
        "No pass is named gather_products; the pipeline has none.",
    ),
    "class": (
        lambda: OPTIMIZATIONS.after("gather_products", RemoveAdapters),  # type: ignore[arg-type]
        "RemoveAdapters is a class, and a pipeline takes its objects. The way out: RemoveAdapters().",
    ),
    "function": (
        lambda: Pipeline((no_pass,)),  # type: ignore[arg-type]
        "A pipeline takes passes, which are objects of subclasses of GraphPass, not a function no_pass.",
    ),
    "another class": (
        lambda: Pipeline((nn.Linear,)),  # type: ignore[arg-type]
        "A pipeline takes passes, which are objects of subclasses of GraphPass, not the class Linear.",
    ),
    "pipeline": (
        lambda: Pipeline((OPTIMIZATIONS, Returns(0))),  # type: ignore[arg-type]
        "A pipeline takes passes, which are objects of subclasses of GraphPass, not a Pipeline.",
    ),
    "no tuple": (
        lambda: Pipeline(RemoveAdapters()),  # type: ignore[arg-type]
        "Pipeline takes a tuple of passes, not a RemoveAdapters.",
    ),
    "pass for a pipeline": (
        lambda: llfx.optimize(llfx.capture(Down()), RemoveAdapters()),  # type: ignore[arg-type]
        "optimize takes a Pipeline of passes, not a RemoveAdapters.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message
